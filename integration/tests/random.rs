//! Random clusters: what the kernels do with packets, in every mode of ours and of the real
//! kube-proxy, is what a plain reading of the plan says. Needs root and the real programs.
//!
//! Every run plays the same clusters. `LOCKSTEP_SEEDS=new` plays two that nobody has seen,
//! `LOCKSTEP_SEEDS=1,2,3` those of these seeds.

#![allow(clippy::print_stdout, reason = "a seed is what is needed to see a failure again")]

use anyhow::{Context, Result, ensure};
use fastrand::Rng;
use lockstep_integration::kube_proxy_cluster::KubeProxyCluster;
use lockstep_integration::lab::Lab;
use lockstep_integration::product::{Mode, Product};
use lockstep_integration::random::expectation::Plans;
use lockstep_integration::random::{objects, probes};
use lockstep_integration::scenario::{Network, Subject};

/// The one that the API server makes.
const SERVICE_CIDR: &str = "\
apiVersion: networking.k8s.io/v1
kind: ServiceCIDR
metadata: {name: kubernetes, uid: uid-kubernetes}
spec: {cidrs: [10.96.0.0/12, 'fd00:96::/112']}
";
const NODES: u8 = 3;
const PODS: u8 = 2;
/// Probes per cluster and network.
const PROBES: usize = 240;
/// What every run plays: two that were picked at random, and whatever once showed a fault.
const KEPT: [u64; 2] = [11_560_225_011_065_291_471, 17_575_018_792_020_534_887];
/// How many new ones are played where such are asked for.
const NEW: usize = 2;

#[test]
fn packets_go_where_a_plain_reading_of_the_plan_says() -> Result<()> {
    let seeds = seeds()?;
    let ours = ours()?;
    let theirs = KubeProxyCluster::start(NODES, PODS, "")?;
    let mut shares: Vec<_> = ours.iter().flat_map(|product| product.shares(1)).collect();
    let mut subjects: Vec<&mut dyn Subject> = shares.iter_mut().map(|it| it as &mut dyn Subject).collect();
    let mut theirs = theirs.shares(1)?;
    subjects.extend(theirs.iter_mut().map(|it| it as &mut dyn Subject));
    let mut faults = Vec::new();
    for seed in seeds {
        println!("seed {seed}: LOCKSTEP_SEEDS={seed} plays it again");
        let found = play(seed, &ours[0], &mut subjects).with_context(|| format!("seed {seed}"))?;
        faults.extend(found.into_iter().map(|fault| format!("seed {seed}: {fault}")));
    }
    let shown: Vec<&str> = faults.iter().take(60).map(String::as_str).collect();
    ensure!(faults.is_empty(), "{} faults:\n{}", faults.len(), shown.join("\n"));
    Ok(())
}

/// Two clusters after one another: the second is what the first becomes, so that changes of
/// every kind are programmed, too.
fn play(seed: u64, product: &Product, subjects: &mut [&mut dyn Subject]) -> Result<Vec<String>> {
    let mut rng = Rng::with_seed(seed);
    let mut faults = Vec::new();
    for step in ["first", "then"] {
        let cluster = objects::generate(&mut rng, &product.lab);
        for subject in subjects.iter_mut() {
            subject.make(&cluster.manifests)?;
        }
        let plans = Plans::of(product)?;
        let probes = probes::generate(&mut rng, &product.lab, &plans, &cluster.doors, PROBES)?;
        let networks: Vec<Network<'_>> = subjects.iter().flat_map(|subject| subject.networks()).collect();
        let found = probes::send(&networks, &probes);
        println!("  {step}: {} probes in {} networks, {} faults", probes.len(), networks.len(), found.len());
        faults.extend(found.into_iter().map(|fault| format!("{step}: {fault}")));
    }
    Ok(faults)
}

fn ours() -> Result<Vec<Product>> {
    let start = |mode| {
        let mut product = Product::new(Lab::new(NODES, PODS)?, &[mode; NODES as usize])?;
        product.write_manifest("nodes.yaml", &product.node_manifest())?;
        product.write_manifest("service-cidr.yaml", SERVICE_CIDR)?;
        product.start().with_context(|| format!("{mode:?}"))?;
        Ok(product)
    };
    Mode::ALL.into_iter().map(start).collect()
}

fn seeds() -> Result<Vec<u64>> {
    match std::env::var("LOCKSTEP_SEEDS") {
        Err(_) => Ok(KEPT.to_vec()),
        Ok(new) if new == "new" => Ok(std::iter::repeat_with(|| fastrand::u64(..)).take(NEW).collect()),
        Ok(asked) => asked.split(',').map(|seed| seed.trim().parse().context("LOCKSTEP_SEEDS")).collect(),
    }
}
