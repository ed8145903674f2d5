//! Measures the control plane with many streams: `lockstep-simulator STREAMS SERVICES CHANGES`.
//! Every Service has ten endpoints; every change replaces one endpoint of one Service.

use std::fmt::Write as _;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lockstep_integration::control_plane::ControlPlane;
use lockstep_integration::simulator::{Crowd, usage};
use lockstep_wire::v1;

const USAGE: &str = "usage: lockstep-simulator STREAMS SERVICES CHANGES";
/// Services of one file.
const PER_FILE: u32 = 100;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let numbers: Vec<u32> =
        std::env::args().skip(1).map(|it| it.parse()).collect::<Result<_, _>>().context(USAGE)?;
    let [streams, services, changes] = numbers[..] else { anyhow::bail!(USAGE) };
    let directory = tempfile::tempdir()?;
    let manifests = directory.path().join("manifests");
    fs::create_dir(&manifests)?;
    write_cluster(&manifests, services)?;
    let mut out = std::io::stdout().lock();

    let start = Instant::now();
    let source = format!("files:{}", manifests.display());
    let mut control_plane = ControlPlane::start(&["--source", &source, "--insecure"]).await?;
    control_plane.ready().await?;
    let pid = control_plane.pid().context("it runs")?;
    let loaded = usage(pid)?;
    writeln!(
        out,
        "loaded {services} x 10 in {:?}: RSS {} MiB, peak {} MiB",
        start.elapsed(),
        loaded.rss,
        loaded.peak
    )?;

    let start = Instant::now();
    let mut crowd = Crowd::join(&control_plane.url(), usize::try_from(streams)?)?;
    let mut head = head(&control_plane).await?;
    crowd.reach(head).await?;
    let joined = usage(pid)?;
    writeln!(
        out,
        "{streams} streams got everything in {:?}: CPU {:?}, RSS {} MiB, peak {} MiB",
        start.elapsed(),
        joined.cpu - loaded.cpu,
        joined.rss,
        joined.peak
    )?;

    let (mut halves, mut alls) = (Vec::new(), Vec::new());
    for number in 0..changes {
        // Not busy: each change is published at once.
        tokio::time::sleep(Duration::from_millis(200)).await;
        let start = Instant::now();
        write_file(&manifests, "moving.yaml", &moving(number + 1))?;
        head += 1;
        let times = crowd.reach(head).await?;
        let half = times.get(times.len() / 2).context("somebody")?;
        halves.push(half.duration_since(start));
        alls.push(times.last().context("somebody")?.duration_since(start));
    }
    let after = usage(pid)?;
    halves.sort_unstable();
    alls.sort_unstable();
    let at = |times: &[Duration], percent: usize| {
        times.get(times.len() * percent / 100).copied().unwrap_or_default()
    };
    writeln!(
        out,
        "{changes} changes, manifest written -> half of the nodes: p50 {:?}, p99 {:?}; -> all nodes: p50 {:?}, p99 {:?}",
        at(&halves, 50),
        at(&halves, 99),
        at(&alls, 50),
        at(&alls, 99)
    )?;
    writeln!(
        out,
        "CPU per change {:?}, RSS {} MiB, peak {} MiB",
        (after.cpu - joined.cpu) / changes.max(1),
        after.rss,
        after.peak
    )?;
    let metrics = control_plane.get("/metrics").await?.1;
    for line in metrics.lines().filter(|line| line.contains("frame_ready") || line.contains("frames_built")) {
        if !line.starts_with('#') {
            writeln!(out, "  {line}")?;
        }
    }
    Ok(())
}

async fn head(control_plane: &ControlPlane) -> Result<u64> {
    let request = v1::GetServerInfoRequest {};
    let info = control_plane.status().await?.get_server_info(request).await?.into_inner();
    let head = info.head.context("a head")?.seq;
    ensure!(head > 0, "nothing is published");
    Ok(head)
}

fn write_cluster(directory: &Path, services: u32) -> Result<()> {
    for first in (0..services).step_by(PER_FILE as usize) {
        let mut text = String::new();
        for index in first..services.min(first + PER_FILE) {
            manifest(&mut text, &format!("service-{index:05}"), index, index * 10, 0)?;
        }
        write_file(directory, &format!("{first:05}.yaml"), &text)?;
    }
    write_file(directory, "moving.yaml", &moving(0))
}

/// One Service whose first endpoint is another one each time.
fn moving(number: u32) -> String {
    let mut text = String::new();
    // Writing to a String does not fail.
    let _ = manifest(&mut text, "moving", 0x3f_0000, 0x30_0000, number);
    text
}

fn manifest(text: &mut String, name: &str, index: u32, first: u32, moved: u32) -> std::fmt::Result {
    let address = |base: u32, number: u32| std::net::Ipv4Addr::from(base + number);
    write!(
        text,
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: default}}\n\
         spec: {{type: ClusterIP, clusterIPs: [{}], ports: [{{name: http, port: 80}}]}}\n\
         ---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: {name}-1, namespace: default, labels: {{kubernetes.io/service-name: {name}}}}}\n\
         addressType: IPv4\nports: [{{name: http, port: 8080}}]\nendpoints:\n",
        address(0x0a40_0001, index),
    )?;
    for endpoint in 0..10 {
        // The first one moves behind all others, the others stay where they are.
        let number = first + endpoint + if endpoint == 0 && moved > 0 { 9 + moved } else { 0 };
        writeln!(
            text,
            "- {{addresses: [{}], nodeName: node-{}}}",
            address(0x0a80_0001, number),
            number % 100
        )?;
    }
    Ok(())
}

/// At once, as an editor or `mv` does.
fn write_file(directory: &Path, name: &str, text: &str) -> Result<()> {
    let partial = directory.with_extension("partial");
    fs::write(&partial, text)?;
    Ok(fs::rename(partial, directory.join(name))?)
}
