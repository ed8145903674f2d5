//! Somebody's share of a product that runs: objects of its own, in a manifest of their own, beside
//! those of others.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;

use crate::product::Product;
use crate::scenario::{Network, Proxy, Subject};

/// A share. All nodes of the product are taken to be in the mode of the first.
#[derive(Debug)]
pub struct Share<'a> {
    product: &'a Product,
    manifest: String,
    is_there: bool,
    /// Held while a change is taken in: the head that moves is then this change's.
    taking_in: Arc<Mutex<()>>,
}

impl Product {
    /// That many shares, for as many threads.
    pub fn shares(&self, count: usize) -> Vec<Share<'_>> {
        let taking_in = Arc::new(Mutex::new(()));
        let share = |number| Share {
            product: self,
            manifest: format!("share-{number}.yaml"),
            is_there: false,
            taking_in: taking_in.clone(),
        };
        (1..=count).map(share).collect()
    }
}

impl Subject for Share<'_> {
    fn make(&mut self, objects: &str) -> Result<()> {
        if objects.is_empty() && !self.is_there {
            return Ok(());
        }
        let one = self.taking_in.lock().unwrap_or_else(PoisonError::into_inner);
        let head = self.product.take_in(|product| match objects {
            "" => product.remove_manifest(&self.manifest),
            _ => product.write_manifest(&self.manifest, objects),
        })?;
        drop(one);
        self.is_there = !objects.is_empty();
        self.product.wait_verified(head)
    }

    fn networks(&self) -> Vec<Network<'_>> {
        let mode = self.product.modes[0];
        vec![Network { lab: &self.product.lab, proxy: Proxy::Lockstep, mode }]
    }
}
