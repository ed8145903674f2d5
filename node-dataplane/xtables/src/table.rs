//! Tables by name.

/// A table that some backend writes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Table {
    /// `filter`: what is accepted and refused.
    Filter,
    /// `nat`: what is translated.
    Nat,
    /// `mangle`: what comes before both.
    Mangle,
}

impl Table {
    /// All of them, in the order in which they are written and listed.
    pub const ALL: [Table; 3] = [Table::Filter, Table::Nat, Table::Mangle];

    /// As the tools and the kernel call it.
    pub fn name(self) -> &'static str {
        match self {
            Table::Filter => "filter",
            Table::Nat => "nat",
            Table::Mangle => "mangle",
        }
    }
}
