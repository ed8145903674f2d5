//! The fixed chains of one family, and the tool that writes them.

use lockstep_view::backend::Drift;
use lockstep_xtables::{FixedChains, Snapshot, Table, Tool, ToolError};

use crate::fixed;
use crate::terms::Terms;

/// One family's chains.
pub(crate) struct Chains {
    pub(crate) tool: Tool,
    pub(crate) random_fully: bool,
    /// What was written last; `None` = nothing yet.
    written: Option<FixedChains>,
}

impl Chains {
    pub(crate) fn new(tool: Tool, random_fully: bool) -> Self {
        Self { tool, random_fully, written: None }
    }

    /// Makes some of the tables' chains what they should be. Returns the objects written.
    pub(crate) fn write(&mut self, terms: &Terms, tables: &[Table]) -> Result<usize, ToolError> {
        let chains = fixed::chains(terms, self.tool.family, self.random_fully);
        let written = chains.clone().within(tables).ensure(&self.tool)?;
        self.written = Some(chains);
        Ok(written)
    }

    /// What is not as it was written.
    pub(crate) fn drift(&self) -> Result<Vec<Drift>, ToolError> {
        let Some(written) = &self.written else { return Ok(Vec::new()) };
        Ok(written.drift(self.tool.family, &Snapshot::parse(&self.tool.save()?)))
    }

    pub(crate) fn forget(&mut self) {
        self.written = None;
    }

    /// True where the kernel has chains of this mode.
    pub(crate) fn standing(&self) -> Result<bool, ToolError> {
        let saved = self.tool.save()?;
        let snapshot = Snapshot::parse(&saved);
        Ok(snapshot.body(Table::Filter, crate::names::FILTER).is_some())
    }
}
