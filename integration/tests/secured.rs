//! TLS from the flags of the real programs: certificates from the control plane to the kernel,
//! and the one line that whoever starts an agent with the wrong ones gets to read. Needs root.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use lockstep_integration::certificates::{Authority, Secret};
use lockstep_integration::fixture::{self, web};
use lockstep_integration::lab::{Family, Place};
use lockstep_integration::product::{Mode, PATIENCE, Product, wait_until};
use lockstep_integration::traffic::{Outcome, Transport, probe};

const NODE: Place = Place::Node(1);
const NO_CONNECTION: &str = "no connection to the control plane";
/// In TLS 1.3 the server's reason can get lost behind the end of the connection.
const SILENCE: &str = "are the client certificate and its key right?";
/// An agent that was refused so often has shown how it speaks of it.
const TRIES: usize = 4;

fn secured(modes: &[Mode]) -> Result<Product> {
    let mut product = fixture::product(modes)?;
    product.secure()?;
    Ok(product)
}

#[test]
fn with_certificates_a_service_is_programmed_verified_and_asked_about() -> Result<()> {
    let mut product = secured(&[Mode::Nftables, Mode::IptablesNft])?;
    product.start()?;
    product.change(|product| {
        product.write_manifest("roll.yaml", &fixture::roll_manifest(&[Place::Pod(1, 2), Place::Pod(2, 2)]))
    })?;
    ensure!(product.wait_service("default", "web")?, "the wait ended without being done");
    for (from, family) in [(Place::Pod(1, 2), Family::V4), (Place::Pod(2, 2), Family::V6)] {
        let outcome = probe(&product.lab, from, Transport::Tcp, web(family))?;
        ensure!(matches!(outcome, Outcome::Answered { .. }), "{from}: {outcome}\n{}", product.logs());
    }
    let waited = product.ctl(&["wait", "default/web", "--level", "verified"])?.output()?;
    ensure!(waited.status.success(), "{}", String::from_utf8_lossy(&waited.stderr));
    Ok(())
}

/// What a control plane says of a connection or a stream that it does not take, to whoever looks.
fn refusals(product: &mut Product) -> Result<usize> {
    let log = product.control_plane()?.log();
    Ok(log.matches("a TLS handshake failed").count() + log.matches("stream refused").count())
}

/// Starts an agent that will be refused, lets it try several times and returns the one line that
/// it has to say about that.
fn refused(product: &mut Product, name: &str, security: &[String]) -> Result<String> {
    let before = refusals(product)?;
    let mut agent = product.spawn_agent_that(1, name, security)?;
    wait_until("the agent has tried several times", PATIENCE, || {
        ensure!(agent.ended()?.is_none(), "it ended");
        Ok((refusals(product)? >= before + TRIES).then_some(()))
    })
    .with_context(|| format!("{name}: {}\n{}", agent.log(), product.logs()))?;
    let log = agent.log();
    agent.terminate()?;
    let lines: Vec<&str> =
        log.lines().filter(|line| line.contains("WARN") || line.contains("ERROR")).collect();
    ensure!(lines.len() == 1 && lines[0].contains(NO_CONNECTION), "{name}: one line for one trouble: {log}");
    let tables = product.lab.tool(NODE, &["nft", "list", "tables"])?;
    ensure!(!tables.contains("lockstep"), "{name}: something was programmed: {tables}");
    Ok(lines[0].to_owned())
}

#[test]
fn an_agent_that_trusts_or_shows_the_wrong_certificates_says_so_once() -> Result<()> {
    let mut product = secured(&[Mode::Nftables])?;
    product.start_control_plane()?;
    let directory = product.lab.directory().to_owned();
    let at = format!("--control-plane={}", product.url());
    let flags = |secret: &Secret, shown: bool| [secret.client_flags(shown), vec![at.clone()]].concat();
    let (stranger, place) = (Authority::new()?, |name: &str| -> PathBuf { directory.join(name) });

    let secrets = product.secrets()?;
    let pair = secrets.authority.issue("system:node:node1", &[])?;
    let wrong_ca = Secret::new(place("wrong-ca"), &stranger, Some(&pair))?;
    let shown = stranger.issue("system:node:node1", &[])?;
    let wrong_pair = Secret::new(place("wrong-pair"), &secrets.authority, Some(&shown))?;
    let other =
        Secret::new(place("other"), &secrets.authority, Some(&secrets.authority.issue("node2", &[])?))?;
    let own = secrets.nodes[0].client_flags(true);
    let without = flags(&secrets.nodes[0], false);
    // The reason of the server arrives, or what its silence may mean.
    let cases = [
        ("wrong-ca", flags(&wrong_ca, true), ["invalid peer certificate: "; 2]),
        ("no-certificate", without, ["received fatal alert: CertificateRequired", SILENCE]),
        ("unknown-certificate", flags(&wrong_pair, true), ["received fatal alert: ", SILENCE]),
        ("node1", flags(&other, true), ["is not in the client certificate, which names"; 2]),
    ];
    for (name, security, why) in cases {
        let line = refused(&mut product, name, &security)?;
        let named = why.iter().any(|why| line.contains(why)) && line.contains(&product.url());
        ensure!(named, "{name}: one of {why:?} in {line}");
    }

    // The control plane goes on under a certificate for somebody else.
    let secrets = product.secrets()?;
    let elsewhere = secrets.authority.issue("control-plane", &["control-plane.elsewhere.example"])?;
    secrets.control_plane.replace(&secrets.authority, Some(&elsewhere))?;
    product.control_plane()?.wait_for_log("renewed certificates are in force")?;
    let line = refused(&mut product, "another-host", &[own, vec![at.clone()]].concat())?;
    ensure!(line.contains("certificate not valid for name") && line.contains("elsewhere"), "{line}");
    Ok(())
}

#[test]
fn a_url_that_contradicts_the_flags_ends_an_agent_before_it_touches_anything() -> Result<()> {
    let mut product = secured(&[Mode::Nftables])?;
    let own = product.secrets()?.nodes[0].client_flags(true);
    let ca = vec![own[0].clone()];
    let broken = vec![own[0].clone(), own[1].clone(), own[2].replace("tls.key", "tls.crt")];
    let (plain, secure) =
        ("--control-plane=http://10.200.0.1:7443", "--control-plane=https://10.200.0.1:7443");
    let cases = [
        (plain, ca, "http:// is plaintext, which needs --insecure instead of --ca"),
        (plain, vec![], "one of --ca FILE and --insecure is needed"),
        (
            secure,
            vec!["--insecure".to_owned()],
            "https:// is TLS, which needs --ca FILE instead of --insecure",
        ),
        (secure, vec!["--ca=/nonexistent/ca.crt".to_owned()], "/nonexistent/ca.crt: No such file"),
        (secure, broken, "--ca, --cert, --key: the certificates cannot be used: "),
    ];
    for (number, (url, mut security, why)) in cases.into_iter().enumerate() {
        security.push(url.to_owned());
        let mut agent = product.spawn_agent_that(1, &format!("agent-{number}"), &security)?;
        let status = wait_until("the agent ends", PATIENCE, || agent.ended())?;
        let log = agent.log();
        ensure!(status.code() == Some(2), "{security:?}: {status}: {log}");
        ensure!(log.lines().count() == 1 && log.contains(why), "{security:?}: {why:?} in {log}");
    }
    Ok(())
}
