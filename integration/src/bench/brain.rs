//! What the control plane does for one event: store it, and make the frame for the streams.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::cluster::Upstream;

/// Times from an event of one replaced endpoint to the frame, at one size.
pub fn measure(services: u32, repetitions: usize) -> Result<Vec<Duration>> {
    let mut upstream = Upstream::new(services);
    let mut times = Vec::with_capacity(repetitions);
    for _ in 0..repetitions {
        let event = upstream.replace(1);
        let start = Instant::now();
        let frames = upstream.publish(event)?;
        times.push(start.elapsed());
        drop(frames);
    }
    Ok(times)
}
