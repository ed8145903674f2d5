//! Schedulers, each of which is a module of the kernel.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::{Result, ensure};
use lockstep_backend_ipvs::SCHEDULERS;
use lockstep_integration::fixture::roll;
use lockstep_integration::lab::{POD_CIDRS, Place};
use lockstep_integration::product::{PATIENCE, wait_until};

use crate::{FIRST, NODE, SECOND, only_answer, product_with, virtual_servers};

/// What is loaded concerns the whole machine, so one test at a time.
static MODULES: Mutex<()> = Mutex::new(());

fn module(scheduler: &str) -> PathBuf {
    let directory = format!("/lib/modules/{}/kernel/net/netfilter/ipvs", lockstep_kernel::release());
    PathBuf::from(directory).join(format!("ip_vs_{scheduler}.ko"))
}

#[test]
fn every_scheduler_that_the_kernel_has_forwards() -> Result<()> {
    let _alone = MODULES.lock().unwrap_or_else(PoisonError::into_inner);
    let mut product = product_with(&[])?;
    product.start_control_plane()?;
    let mut tried = Vec::new();
    for scheduler in SCHEDULERS.into_iter().filter(|scheduler| module(scheduler).exists()) {
        let flag = format!("--ipvs-scheduler={scheduler}");
        product.set_agent_flags(&[&flag, &format!("--cluster-cidr={POD_CIDRS}")]);
        product.start_agent(1)?;
        product.wait_verified(0)?;
        let servers = virtual_servers(&product)?;
        ensure!(servers.contains(&format!("-A -t {} -s {scheduler}", roll())), "{scheduler}:\n{servers}");
        only_answer(&product, Place::Outside, roll(), &[FIRST, SECOND])?;
        only_answer(&product, NODE, roll(), &[FIRST, SECOND])?;
        product.agent(1)?.terminate()?;
        tried.push(scheduler);
    }
    println!("{} schedulers of {}: {tried:?}", tried.len(), SCHEDULERS.len());
    ensure!(
        tried.len() >= SCHEDULERS.len() - 1,
        "only {tried:?}; all but twos are as old as the guest's kernel"
    );
    Ok(())
}

/// A module that cannot be loaded as long as this lives.
struct Hidden(PathBuf);

impl Hidden {
    fn new(module: PathBuf) -> Result<Self> {
        fs::rename(&module, module.with_extension("aside"))?;
        Ok(Self(module))
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        // The other test fails where it is not back.
        let _ = fs::rename(self.0.with_extension("aside"), &self.0);
    }
}

#[test]
fn without_the_schedulers_module_the_agent_ends_and_names_it() -> Result<()> {
    let _alone = MODULES.lock().unwrap_or_else(PoisonError::into_inner);
    let product = product_with(&["--ipvs-scheduler=mh"])?;
    // The other test may have loaded it; it fails where it is not.
    let _ = Command::new("rmmod").arg("ip_vs_mh").output()?;
    let hidden = Hidden::new(module("mh"))?;
    let mut agent = product.spawn_agent(1, "node1")?;
    let status = wait_until("the agent ends", PATIENCE, || agent.ended())?;
    drop(hidden);
    let log = agent.log();
    ensure!(status.code() == Some(3), "it ended with {status}\n{log}");
    ensure!(log.contains("scheduler mh") && log.contains("ip_vs_mh"), "the module is not named:\n{log}");
    Ok(())
}
