//! Every chore of the project as `cargo xtask <verb>`.
fn main() {}
