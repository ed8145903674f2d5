//! The program as a process: exit codes, start-up errors, a clean end. Needs no root.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, ExitStatus, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};

/// A program that ends with the test, also with one that fails.
struct Running(Child);

impl Running {
    fn terminate(&self) {
        let pid = Pid::from_child(&self.0);
        kill_process(pid, Signal::TERM).expect("it runs until it is waited for");
    }

    fn wait(&mut self) -> ExitStatus {
        self.0.wait().expect("a child can be waited for")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

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

/// Reads a JSON log up to the first line with this text, which is returned.
fn log_until(log: &mut impl BufRead, what: &str) -> serde_json::Value {
    let mut line = String::new();
    while !line.contains(what) {
        line.clear();
        assert!(log.read_line(&mut line).expect("its log") > 0, "it ended before: {what}");
    }
    serde_json::from_str(&line).expect("a line of JSON")
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
fn plaintext_can_be_asked_for_by_the_environment_in_every_usual_word() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let source = directory();
    for (value, code, says) in [
        ("1", 1, "Address already in use"),
        ("true", 1, "Address already in use"),
        ("0", 2, "one of --tls-cert FILE (with --tls-key) and --insecure is needed"),
        ("perhaps", 2, "--insecure"),
    ] {
        let mut command = control_plane(&["--source", &source, "--listen", &address]);
        let output = command.env("LOCKSTEP_INSECURE", value).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{value}: {error}");
        assert!(error.contains(says), "{value}: {error}");
    }
    // The port is that of somebody who does not answer: what matters is how far it comes.
    drop(taken);
    for (value, code, says) in [("1", 1, "Connection refused"), ("0", 2, "plaintext needs --insecure")] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lockstepctl"));
        command.args(["--server", &format!("http://{address}"), "status"]);
        let output = command.env("LOCKSTEP_INSECURE", value).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{value}: {error}");
        assert!(error.contains(says), "{value}: {error}");
    }
}

#[test]
fn options_of_lockstepctl_come_from_the_environment_too() {
    for (call, name) in [
        (&["wait"][..], "LOCKSTEP_TIMEOUT"),
        (&["wait"], "LOCKSTEP_LEVEL"),
        (&["watch"], "LOCKSTEP_INTERVAL"),
        (&["status"], "LOCKSTEP_OUTPUT"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lockstepctl"));
        let output = command.args(call).env(name, "nonsense").output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{name}: {error}");
        assert!(error.contains("nonsense"), "{name}: {error}");
    }
    for call in ["services", "failures"] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lockstepctl"));
        let help = command.args([call, "--help"]).output().unwrap().stdout;
        assert!(String::from_utf8(help).unwrap().contains("LOCKSTEP_NAMESPACE"), "{call}");
    }
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
    let mut process =
        Running(control_plane(&[&["--source", &source], &listen[..]].concat()).spawn().unwrap());
    let mut log = BufReader::new(process.0.stderr.take().unwrap());
    let mut first = String::new();
    log.read_line(&mut first).unwrap();
    let first: serde_json::Value = serde_json::from_str(&first).unwrap();
    assert_eq!(first["message"], "started");
    assert_eq!(first["source"], source.as_str());
    log_until(&mut log, "\"serving\"");
    process.terminate();
    let mut rest = String::new();
    log.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\"stopped\""), "{rest}");
    assert_eq!(process.wait().code(), Some(0));
}

#[test]
fn without_file_descriptors_it_waits_says_so_once_and_goes_on() {
    let mut shell = Command::new("sh");
    let program = env!("CARGO_BIN_EXE_lockstep-control-plane");
    shell.args(["-c", "ulimit -n 48; exec \"$0\" \"$@\"", program, "--source", &directory()]);
    shell.args(["--listen", "127.0.0.1:0", "--insecure", "--log-format", "json"]).env_remove("LOCKSTEP_LOG");
    let mut process = Running(shell.stderr(Stdio::piped()).spawn().unwrap());
    let mut log = BufReader::new(process.0.stderr.take().unwrap());
    let mut until = |what: &str| log_until(&mut log, what);
    assert_eq!(until("few open files")["maximum"], 48);
    let address = until("\"started\"")["listen"].as_str().unwrap().to_owned();
    let crowd: Vec<TcpStream> = (0..64).map(|_| TcpStream::connect(&address).unwrap()).collect();
    until("could not be accepted");
    drop(crowd);
    // An HTTP/2 server speaks first: its settings.
    let mut late = TcpStream::connect(&address).unwrap();
    late.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").unwrap();
    late.read_exact(&mut [0; 9]).unwrap();
    process.terminate();
    let mut rest = String::new();
    log.read_to_string(&mut rest).unwrap();
    assert!(!rest.contains("could not be accepted"), "{rest}");
    assert_eq!(process.wait().code(), Some(0));
}

#[test]
fn explain_asks_a_control_plane_and_no_node_is_needed() {
    let manifests = concat!("files:", env!("CARGO_MANIFEST_DIR"), "/../../deploy/examples");
    let listen = ["--listen", "127.0.0.1:0", "--insecure", "--log-format", "json"];
    let mut process =
        Running(control_plane(&[&["--source", manifests], &listen[..]].concat()).spawn().unwrap());
    let mut log = BufReader::new(process.0.stderr.take().unwrap());
    let mut until = |what: &str| log_until(&mut log, what);
    let server = format!("http://{}", until("\"started\"")["listen"].as_str().unwrap());
    until("\"serving\"");
    let explain = |binary: &str, node: &str, from: &str, to: &str| {
        let mut command = Command::new(binary);
        command.args(["--server", &server, "--insecure", "explain", "-o", "json", "--node", node]);
        let Output { status, stdout, stderr } = command.args(["--from", from, "tcp", to]).output().unwrap();
        (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
    };
    for binary in [env!("CARGO_BIN_EXE_lockstepctl"), env!("CARGO_BIN_EXE_kubectl-lockstep")] {
        let (code, answer, error) = explain(binary, "node1", "203.0.113.1", "10.96.0.10:80");
        assert_eq!((code, error.as_str()), (Some(0), ""));
        let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
        assert_eq!((&answer["verdict"], &answer["service"]["name"]), (&"Forwarded".into(), &"web".into()));
        assert_eq!(
            (&answer["inForce"]["state"], answer["endpoints"].as_array().unwrap().len()),
            (&"NeverSeen".into(), 3)
        );
    }
    let ctl = env!("CARGO_BIN_EXE_lockstepctl");
    let (code, answer, _) = explain(ctl, "node1", "203.0.113.1", "192.0.2.1:1");
    assert!(code == Some(0) && answer.contains("\"LeftAlone\""), "{code:?} {answer}");
    let (code, _, error) = explain(ctl, "node9", "203.0.113.1", "10.96.0.10:80");
    assert_eq!((code, error.as_str()), (Some(3), "error: node node9: not found\n"));
    let (code, _, error) = explain(ctl, "node1", "fd00::1", "10.96.0.10:80");
    assert!(code == Some(2) && error.contains("--from fd00::1: is not of the family"), "{code:?} {error}");
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
