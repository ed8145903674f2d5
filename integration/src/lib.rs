//! What tests of the whole stand on: real programs in network namespaces, started and ended with
//! the test.
//!
//! ```text
//! lab: namespaces, addresses, routes ──> traffic: who answers whom, seeing which source
//!   │                                                   └─> load: at a steady rate, each judged
//!   └─> product: control plane and agents inside ──> scenario: manifests, probes, expectations
//!         └─> product_share: objects of one's own, for several scenarios at the same time
//! certificates: authorities and what they issue, on disk as Kubernetes mounts a Secret
//! apiserver: a real Kubernetes API server, for the Kubernetes source
//!   ├─> objects: manifests as its objects
//!   └─> relay: the way to it from inside a lab ──> kube_proxy: the real one, on a node
//!         └─> kube_proxy_cluster: in every mode at once, for scenarios to be played on
//! control_plane, follower: the control plane as a process on loopback, and nodes without a kernel
//! foreign: what other programs have in a node's kernel beside us
//! guest: whether all this runs in a kernel of its own, and how patient to be there
//! leftovers: what makes programs and directories end with the process, whatever ends it
//! ```
//!
//! All that drives the product from outside only: its programs, its files and its gRPC contract.
//! [`mod@bench`] alone links its crates, to time their parts.
#![forbid(unsafe_code)]

pub mod apiserver;
pub mod bench;
pub mod certificates;
pub mod control_plane;
pub mod fixture;
pub mod follower;
pub mod foreign;
pub mod guest;
pub mod kube_proxy;
pub mod kube_proxy_cluster;
pub mod lab;
pub mod leftovers;
pub mod load;
pub mod objects;
pub mod product;
pub mod product_share;
pub mod random;
pub mod relay;
pub mod scenario;
pub mod simulator;
pub mod traffic;
