//! What the control plane does for one event of a watch: read the object, store it, and make the
//! frame for the streams.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use lockstep_model::Interner;
use lockstep_source::convert::{self, Outcome};
use lockstep_store::Changes;

use super::cluster::Upstream;

/// Times from the JSON of an EndpointSlice with one replaced endpoint to the frame, at one size.
pub fn measure(services: u32, repetitions: usize) -> Result<Vec<Duration>> {
    let mut upstream = Upstream::new(services);
    let mut names = Interner::default();
    let mut times = Vec::with_capacity(repetitions);
    for _ in 0..repetitions {
        let event = upstream.watched_slice();
        let start = Instant::now();
        let object: EndpointSlice = serde_json::from_str(&event).context("the event")?;
        let Outcome::Object(set) = convert::endpoint_slice(&object, &mut names)? else {
            bail!("{event} was skipped");
        };
        let mut changes = Changes::default();
        changes.upsert(set);
        let frames = upstream.publish(changes)?;
        times.push(start.elapsed());
        drop(frames);
    }
    Ok(times)
}
