//! What others do to our objects.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lockstep_integration::fixture::{started, web};
use lockstep_integration::foreign::rules;
use lockstep_integration::lab::{Family, Place};
use lockstep_integration::product::{Mode, wait_until};

use crate::{NODE, counted, only_answer, repairs, state};

/// An endpoint that is missing gives no sign: an audit finds it, a minute after the last at most.
const AUDITED_WITHIN: Duration = Duration::from_secs(120);

#[test]
fn what_others_change_is_found_repaired_and_counted() -> Result<()> {
    let product = started(&[Mode::Ipvs])?;
    let changes: [(&str, &[&str]); 7] = [
        ("all virtual servers removed", &["ipvsadm", "-C"]),
        ("the interface removed", &["ip", "link", "del", "kube-ipvs0"]),
        ("an address removed", &["ip", "addr", "del", "fd00:96::10/128", "dev", "kube-ipvs0"]),
        ("a set flushed", &["ipset", "flush", "KUBE-CLUSTER-IP"]),
        ("a chain flushed", &["iptables-nft", "-t", "nat", "-F", "KUBE-SERVICES"]),
        ("a jump removed", &["sh", "-c", "iptables-nft -F INPUT"]),
        ("an endpoint removed", &["ipvsadm", "-d", "-t", "10.96.0.10:80", "-r", "10.244.1.1:8080"]),
    ];
    let whole = || -> Result<String> { Ok(format!("{}{}", state(&product)?, rules(&product, 1)?)) };
    let before = whole()?;
    for (name, change) in changes {
        let count = repairs(&product)?;
        let begun = Instant::now();
        product.lab.tool(NODE, change)?;
        wait_until("all is as before", AUDITED_WITHIN, || Ok((whole()? == before).then_some(())))
            .with_context(|| format!("{name}\n{}", product.logs()))?;
        let took = begun.elapsed();
        counted(&product, count).context(name)?;
        println!("{name}: as before after {took:.1?}");
        for family in [Family::V4, Family::V6] {
            only_answer(&product, Place::Pod(1, 2), web(family), &[Place::Pod(1, 1)])?;
        }
    }
    ensure!(before.contains("10.96.0.10:80"), "there was nothing to repair:\n{before}");
    Ok(())
}
