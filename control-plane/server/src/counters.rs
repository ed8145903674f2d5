//! What happened since the process started, for whoever exports metrics.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper bounds of the [`Histogram`] buckets, in microseconds; one more bucket takes the rest.
pub const LATENCY_BUCKETS: [u64; 14] =
    [50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000];

/// Monotonic counters. Each is right by itself; together they are no snapshot.
#[derive(Debug, Default)]
pub struct Counters {
    /// Transactions published.
    pub transactions: Counter,
    /// Sessions that started with nothing to send.
    pub resumed_in_sync: Counter,
    /// Sessions that started with a delta.
    pub resumed_delta: Counter,
    /// Sessions that started with a full snapshot.
    pub resumed_full: Counter,
    /// Streams refused: not serving, unusable Hello, superseded, wrong certificate.
    pub streams_refused: Counter,
    /// Streams ended because a newer one of the same node came.
    pub streams_superseded: Counter,
    /// Reports taken.
    pub acks: Counter,
    /// Reports dropped or refused.
    pub acks_refused: Counter,
    /// Refetch requests.
    pub refetches: Counter,
    /// Transactions encoded.
    pub frames_built: Counter,
    /// Bytes of encoded transactions.
    pub frames_built_bytes: Counter,
    /// Messages handed to transports.
    pub messages_sent: Counter,
    /// Bytes handed to transports.
    pub messages_sent_bytes: Counter,
    /// Change taken in -> its frame ready to send.
    pub frame_ready: Histogram,
}

/// Counts up.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn inc(&self) {
        self.add(1);
    }

    pub(crate) fn add(&self, count: usize) {
        self.0.fetch_add(count as u64, Ordering::Relaxed);
    }

    /// The count.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Durations by [`LATENCY_BUCKETS`].
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [AtomicU64; LATENCY_BUCKETS.len() + 1],
    sum_micros: AtomicU64,
}

impl Histogram {
    pub(crate) fn observe(&self, duration: Duration) {
        let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let bucket = LATENCY_BUCKETS.partition_point(|bound| *bound < micros);
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum_micros.fetch_add(micros, Ordering::Relaxed);
    }

    /// Observations per bucket (not added up) and the sum of all of them.
    pub fn read(&self) -> (Vec<u64>, Duration) {
        let buckets = self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).collect();
        (buckets, Duration::from_micros(self.sum_micros.load(Ordering::Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_belongs_to_its_bucket() {
        let histogram = Histogram::default();
        for micros in [1, 50, 51, 2_000_000] {
            histogram.observe(Duration::from_micros(micros));
        }
        let (buckets, sum) = histogram.read();
        assert_eq!((buckets[0], buckets[1], buckets[LATENCY_BUCKETS.len()]), (2, 1, 1));
        assert_eq!(sum, Duration::from_micros(2_000_102));
    }
}
