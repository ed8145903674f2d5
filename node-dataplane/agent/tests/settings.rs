//! Settings of connection tracking on this kernel, in a network namespace that ends with the
//! test. What is the machine's own is not asked for. Needs root.
#![allow(clippy::unwrap_used)] // what a test needs it states with unwrap

use clap::Parser;
use lockstep_kernel::{netns, sysctl};
use lockstep_node::conntrack::settings::Settings;

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    settings: Settings,
}

fn apply(flags: &[&str]) {
    let flags = [&["test", "--conntrack-max-per-core=0"], flags].concat();
    Line::try_parse_from(flags).unwrap().settings.apply();
}

fn read(key: &str) -> String {
    sysctl::read(&format!("net/netfilter/nf_conntrack_{key}")).unwrap().unwrap()
}

#[test]
fn settings_are_made_in_the_namespace_of_the_agent_and_zero_leaves_them_alone() {
    netns::run_in_new(|| {
        let limit = read("max");
        apply(&["--conntrack-tcp-timeout-established=1234s", "--conntrack-tcp-be-liberal"]);
        assert_eq!(read("tcp_timeout_established"), "1234");
        assert_eq!(read("tcp_timeout_close_wait"), "3600");
        assert_eq!(read("tcp_be_liberal"), "1");
        let untouched = (read("udp_timeout"), read("udp_timeout_stream"));
        apply(&["--conntrack-tcp-timeout-established=0", "--conntrack-udp-timeout=1m1s"]);
        assert_eq!(read("tcp_timeout_established"), "1234");
        assert_eq!(read("tcp_be_liberal"), "1", "not asked for is not switched off");
        assert_eq!((read("udp_timeout"), read("udp_timeout_stream")), ("61".to_owned(), untouched.1));
        assert_eq!(read("max"), limit);
    })
    .unwrap();
}
