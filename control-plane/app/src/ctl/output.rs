//! Text, JSON or YAML.

use std::io::{self, Write};
use std::time::Duration;

use serde::Serialize;

use super::args::Format;

/// Writes a value as the format asks; `text` is how people see it.
pub(super) fn write<T: Serialize>(
    out: &mut dyn Write,
    format: Format,
    value: &T,
    text: impl FnOnce(&T) -> String,
) -> io::Result<()> {
    match format {
        Format::Table => out.write_all(text(value).as_bytes())?,
        Format::Json => {
            serde_json::to_writer_pretty(&mut *out, value)?;
            out.write_all(b"\n")?;
        }
        Format::Yaml => {
            let text = serde_saphyr::to_string(value).map_err(io::Error::other)?;
            out.write_all(text.as_bytes())?;
        }
    }
    out.flush()
}

/// As [`write`], one of several: a line of text, a line of JSON, a document of YAML.
pub(super) fn write_item<T: Serialize>(
    out: &mut dyn Write,
    format: Format,
    value: &T,
    text: impl FnOnce(&T) -> String,
) -> io::Result<()> {
    match format {
        Format::Json => {
            serde_json::to_writer(&mut *out, value)?;
            out.write_all(b"\n")?;
            out.flush()
        }
        Format::Yaml => {
            out.write_all(b"---\n")?;
            write(out, format, value, text)
        }
        Format::Table => write(out, format, value, text),
    }
}

/// Aligned columns.
pub(super) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column names.
    pub(super) fn new(columns: &[&str]) -> Self {
        Self { rows: vec![columns.iter().map(|name| (*name).to_owned()).collect()] }
    }

    /// Adds a row.
    pub(super) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.into());
    }

    /// The table as text; an empty cell is shown as `-`.
    pub(super) fn text(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let cell = |row: &[String], column: usize| match row.get(column).map(|cell| one_line(cell)) {
            Some(cell) if !cell.is_empty() => cell,
            _ => "-".to_owned(),
        };
        let width =
            |column: usize| self.rows.iter().map(|row| cell(row, column).chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            for (column, width) in widths.iter().enumerate() {
                let cell = cell(row, column);
                match column + 1 == columns {
                    true => text.push_str(&cell),
                    false => text.push_str(&format!("{cell:<width$}   ")),
                }
            }
            text.truncate(text.trim_end().len());
            text.push('\n');
        }
        text
    }
}

/// Names and values, aligned; an empty value is shown as `-`.
pub(super) fn fields(fields: &[(&str, String)]) -> String {
    let width = fields.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let shown = |value: &str| if value.is_empty() { "-".into() } else { one_line(value) };
    fields.iter().map(|(name, value)| format!("{name:<width$}   {}\n", shown(value))).collect()
}

/// Messages come from nodes: they must not be able to break the layout, or drive a terminal.
pub(super) fn one_line(text: &str) -> String {
    text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect()
}

/// A duration as people say it: `0.4ms`, `12ms`, `2.3s`, `4m10s`, `3h12m`, `2d5h`.
pub(super) fn time(seconds: f64) -> String {
    let duration = Duration::try_from_secs_f64(seconds).unwrap_or_default();
    let whole = duration.as_secs();
    match whole {
        0 if duration < Duration::from_millis(10) => format!("{:.1}ms", seconds * 1e3),
        0 => format!("{}ms", duration.as_millis()),
        1..60 => format!("{seconds:.1}s"),
        60..3_600 => format!("{}m{}s", whole / 60, whole % 60),
        3_600..86_400 => format!("{}h{}m", whole / 3_600, whole % 3_600 / 60),
        _ => format!("{}d{}h", whole / 86_400, whole % 86_400 / 3_600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_end_with_their_text() {
        let mut table = Table::new(&["NAME", "STATE", "WHY"]);
        table.row(["a".into(), "in sync".into(), String::new()]);
        table.row(["longer".into(), String::new(), "no\nroom\x1b[31m".into()]);
        let expected = "NAME     STATE     WHY\n\
                        a        in sync   -\n\
                        longer   -         no room [31m\n";
        assert_eq!(table.text(), expected);
    }

    #[test]
    fn times_have_two_figures_that_matter() {
        let times = [0.0004, 0.0123, 0.5, 2.34, 250.0, 11_520.0, 190_800.0].map(time);
        assert_eq!(times, ["0.4ms", "12ms", "500ms", "2.3s", "4m10s", "3h12m", "2d5h"]);
    }
}
