//! Clients that stick to an endpoint.

use anyhow::{Result, ensure};
use lockstep_integration::fixture::{roll, roll_manifest};
use lockstep_integration::lab::Place;
use lockstep_integration::product::Product;
use lockstep_integration::traffic::{Outcome, Transport, probe};

use crate::{FIRST, NODE, SECOND, only_answer, product_with, virtual_servers};

fn sticky(product: &Product, pods: &[Place]) -> Result<()> {
    let manifest = roll_manifest(pods).replacen("spec:\n", "spec:\n  sessionAffinity: ClientIP\n", 1);
    product.write_manifest("roll.yaml", &manifest)
}

#[test]
fn a_client_goes_elsewhere_at_once_when_its_endpoint_is_gone() -> Result<()> {
    let mut product = product_with(&[])?;
    sticky(&product, &[FIRST, SECOND])?;
    product.start()?;
    for client in [Place::Outside, NODE] {
        let Outcome::Answered { by, .. } = probe(&product.lab, client, Transport::Tcp, roll())? else {
            anyhow::bail!("{client}: no answer\n{}", virtual_servers(&product)?);
        };
        only_answer(&product, client, roll(), &[by])?;
        let other = if by == FIRST { SECOND } else { FIRST };
        product.change(|product| sticky(product, &[other]))?;
        only_answer(&product, client, roll(), &[other])?;
        // It sticks to the new one, also when the old one is back.
        product.change(|product| sticky(product, &[FIRST, SECOND]))?;
        only_answer(&product, client, roll(), &[other])?;
    }
    let servers = virtual_servers(&product)?;
    ensure!(servers.contains(&format!("-A -t {} -s rr -p 10800", roll())), "not persistent:\n{servers}");
    Ok(())
}
