//! The program as a process: exit codes, start-up errors, a clean end. Needs no root.

use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::process::{Command, Output, Stdio};

fn control_plane(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lockstep-control-plane"));
    command.args(arguments).env_remove("LOCKSTEP_LOG").stderr(Stdio::piped()).stdout(Stdio::piped());
    command
}

fn run(arguments: &[&str]) -> (Option<i32>, String) {
    let Output { status, stderr, .. } = control_plane(arguments).output().expect("the program runs");
    (status.code(), String::from_utf8(stderr).expect("a log is text"))
}

fn directory() -> String {
    format!("files:{}/tests", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn a_wrong_command_line_is_exit_code_2() {
    let (code, error) = run(&["--source", &directory(), "--listen", "127.0.0.1:0"]);
    assert_eq!(code, Some(2));
    assert!(error.contains("--insecure"), "{error}");
    let (code, error) =
        run(&["--source", &directory(), "--kubeconfig", "k", "--listen", "127.0.0.1:0", "--insecure"]);
    assert_eq!(code, Some(2));
    assert!(error.contains("--kubeconfig needs --source kubernetes"), "{error}");
}

#[test]
fn a_port_that_is_taken_is_named_and_exit_code_1() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (code, error) = run(&["--source", &directory(), "--listen", &address, "--insecure"]);
    assert_eq!(code, Some(1));
    assert!(error.contains(&format!("--listen {address}: Address already in use")), "{error}");
}

#[test]
fn a_certificate_that_is_not_there_is_named_and_exit_code_1() {
    let tls = ["--tls-cert", "/nonexistent/cert.pem", "--tls-key", "/nonexistent/key.pem"];
    let (code, error) = run(&[&["--source", &directory(), "--listen", "127.0.0.1:0"], &tls[..]].concat());
    assert_eq!(code, Some(1));
    assert!(error.contains("--tls-cert /nonexistent/cert.pem: No such file"), "{error}");
}

#[test]
fn sigterm_is_a_clean_end_and_logs_are_json_where_asked_for() {
    let listen = ["--listen", "127.0.0.1:0", "--insecure", "--log-format", "json"];
    let source = directory();
    let mut process = control_plane(&[&["--source", &source], &listen[..]].concat()).spawn().unwrap();
    let mut log = BufReader::new(process.stderr.take().unwrap());
    let mut first = String::new();
    log.read_line(&mut first).unwrap();
    let first: serde_json::Value = serde_json::from_str(&first).unwrap();
    assert_eq!(first["message"], "started");
    assert_eq!(first["source"], source.as_str());
    let mut line = String::new();
    while !line.contains("\"serving\"") {
        line.clear();
        assert!(log.read_line(&mut line).unwrap() > 0, "it ended before it served");
    }
    let killed = Command::new("kill").args(["-TERM", &process.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let mut rest = String::new();
    log.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\"stopped\""), "{rest}");
    assert_eq!(process.wait().unwrap().code(), Some(0));
}

#[test]
fn lockstepctl_is_a_kubectl_plugin_too() {
    for (binary, name) in [
        (env!("CARGO_BIN_EXE_lockstepctl"), "lockstepctl"),
        (env!("CARGO_BIN_EXE_kubectl-lockstep"), "kubectl lockstep"),
    ] {
        let output = Command::new(binary).arg("--help").output().unwrap();
        let help = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && help.contains(&format!("Usage: {name} ")), "{help}");
        assert!(help.contains("Exit codes:"), "{help}");
        assert_eq!(Command::new(binary).arg("nonsense").output().unwrap().status.code(), Some(2));
    }
}
