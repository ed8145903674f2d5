//! Metrics: read from the hub when somebody asks, kept nowhere else.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use lockstep_server::{Counters, Histogram, Hub, LATENCY_BUCKETS, Overview};
use lockstep_store::NodeState;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

/// A registry that shows the hub.
pub(super) fn registry(hub: Arc<Hub>) -> Registry {
    let mut registry = Registry::with_prefix("lockstep");
    registry.register_collector(Box::new(HubMetrics(hub)));
    registry
}

#[derive(Debug)]
struct HubMetrics(Arc<Hub>);

impl Collector for HubMetrics {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut out = Out(encoder);
        let overview = self.0.overview();
        state(&mut out, &overview)?;
        nodes(&mut out, &overview)?;
        counters(&mut out, self.0.counters())
    }
}

fn state(out: &mut Out<'_>, overview: &Overview) -> Result<(), fmt::Error> {
    out.gauge("serving", "1 = the source was read completely and the state is served", {
        f64::from(u8::from(overview.not_serving.is_none()))
    })?;
    out.gauge("head_seq", "Newest transaction", float(overview.head.seq))?;
    let resources = [
        ("Service", overview.services),
        ("EndpointSet", overview.endpoint_sets),
        ("ServiceCidr", overview.service_cidrs),
    ];
    let resources = resources.map(|(kind, count)| (kind, float(count)));
    out.gauges("resources", "Resources in the state", "kind", &resources)?;
    out.gauge("quarantined_objects", "Source objects that could not be taken in", {
        float(overview.quarantined as u64)
    })?;
    let age = overview.source_fresh_at.and_then(|at| SystemTime::now().duration_since(at).ok());
    match age {
        Some(age) => out.gauge("source_age_seconds", "Time since the source was heard of", age.as_secs_f64()),
        None => Ok(()),
    }
}

fn nodes(out: &mut Out<'_>, overview: &Overview) -> Result<(), fmt::Error> {
    out.gauge("streams", "Live Sync streams", float(overview.streams as u64))?;
    let counts = overview.counts;
    out.gauge("nodes_expected", "Nodes with a Node object or a live stream", f64::from(counts.expected))?;
    let levels = [("received", counts.received), ("applied", counts.applied), ("verified", counts.verified)];
    let levels = levels.map(|(level, count)| (level, f64::from(count)));
    out.gauges("nodes_at_head", "Expected nodes that have come this far with the head", "level", &levels)?;
    let states: Vec<_> =
        overview.states.iter().map(|(state, count)| (state_name(*state), f64::from(*count))).collect();
    out.gauges("nodes", "Expected nodes by state", "state", &states)?;
    if let Some(convergence) = overview.convergence {
        out.gauge(
            "converged_seq",
            "Newest transaction verified on every expected node",
            float(convergence.seq),
        )?;
        let help = "Publication of that transaction -> its last verification";
        out.gauge("last_convergence_seconds", help, convergence.took.as_secs_f64())?;
    }
    Ok(())
}

fn counters(out: &mut Out<'_>, counters: &Counters) -> Result<(), fmt::Error> {
    let resumes = [
        ("in_sync", counters.resumed_in_sync.get()),
        ("delta", counters.resumed_delta.get()),
        ("full", counters.resumed_full.get()),
    ];
    out.counters("sessions", "Sessions started, by how", "resume", &resumes)?;
    let acks = [("taken", counters.acks.get()), ("refused", counters.acks_refused.get())];
    out.counters("acks", "Reports of nodes", "result", &acks)?;
    for (name, help, value) in [
        ("transactions", "Transactions published", counters.transactions.get()),
        ("streams_refused", "Streams refused", counters.streams_refused.get()),
        (
            "streams_superseded",
            "Streams ended by a newer one of their node",
            counters.streams_superseded.get(),
        ),
        ("refetches", "Refetch requests", counters.refetches.get()),
        ("transactions_encoded", "Transactions encoded", counters.frames_built.get()),
        ("encoded_bytes", "Bytes of encoded transactions", counters.frames_built_bytes.get()),
        ("messages_sent", "Messages handed to transports", counters.messages_sent.get()),
        ("sent_bytes", "Bytes handed to transports", counters.messages_sent_bytes.get()),
    ] {
        out.counter(name, help, value)?;
    }
    let help = "Change taken in -> its encoded form ready to send";
    out.histogram("frame_ready_seconds", help, &counters.frame_ready)
}

fn state_name(state: NodeState) -> &'static str {
    match state {
        NodeState::InSync => "in_sync",
        NodeState::Behind => "behind",
        NodeState::Degraded => "degraded",
        NodeState::Failed => "failed",
        NodeState::Disconnected => "disconnected",
        NodeState::NeverSeen => "never_seen",
    }
}

/// Exact up to 2^53, which is every seq and count there will be.
fn float(number: u64) -> f64 {
    number as f64
}

struct Out<'a>(DescriptorEncoder<'a>);

impl Out<'_> {
    fn gauge(&mut self, name: &str, help: &str, value: f64) -> Result<(), fmt::Error> {
        ConstGauge::new(value).encode(self.0.encode_descriptor(name, help, None, MetricType::Gauge)?)
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) -> Result<(), fmt::Error> {
        ConstCounter::new(value).encode(self.0.encode_descriptor(name, help, None, MetricType::Counter)?)
    }

    fn gauges(&mut self, name: &str, help: &str, label: &str, of: &[(&str, f64)]) -> Result<(), fmt::Error> {
        let mut metric = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        of.iter().try_for_each(|(value, count)| {
            ConstGauge::new(*count).encode(metric.encode_family(&[(label, *value)])?)
        })
    }

    fn counters(
        &mut self,
        name: &str,
        help: &str,
        label: &str,
        of: &[(&str, u64)],
    ) -> Result<(), fmt::Error> {
        let mut metric = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        of.iter().try_for_each(|(value, count)| {
            ConstCounter::new(*count).encode(metric.encode_family(&[(label, *value)])?)
        })
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) -> Result<(), fmt::Error> {
        let (counts, sum) = histogram.read();
        let bounds = LATENCY_BUCKETS.iter().map(|micros| Duration::from_micros(*micros).as_secs_f64());
        let buckets: Vec<_> = bounds.chain([f64::MAX]).zip(counts.iter().copied()).collect();
        let mut metric = self.0.encode_descriptor(name, help, None, MetricType::Histogram)?;
        metric.encode_histogram::<NoLabelSet>(sum.as_secs_f64(), counts.iter().sum(), &buckets, None)
    }
}
