//! What was measured: printed, and kept in a file that the report is made from.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

/// The results of one invocation.
pub struct Results {
    file: PathBuf,
    /// When it began, in seconds since 1970: what tells its rows from those of earlier ones.
    begun: u64,
    /// Fewer and shorter: the figures show that it works, not how fast.
    pub quick: bool,
}

/// A row of a table: what it shows, by column, and the figures behind it.
pub struct Row {
    table: &'static str,
    cells: Map<String, Value>,
    figures: Value,
}

impl Row {
    /// A row of `table` without cells.
    pub fn new(table: &'static str) -> Row {
        Row { table, cells: Map::new(), figures: Value::Null }
    }

    /// One more cell.
    pub fn cell(mut self, column: &str, shown: impl Into<String>) -> Row {
        self.cells.insert(column.to_owned(), Value::String(shown.into()));
        self
    }

    /// The figures that the cells were made from.
    pub fn figures(mut self, figures: Value) -> Row {
        self.figures = figures;
        self
    }
}

impl Results {
    /// Results that are appended to `file`.
    pub fn new(file: PathBuf, quick: bool) -> Results {
        Results { file, begun: crate::model::now() / 1_000_000_000, quick }
    }

    /// `full`, or `quick` in the quick mode.
    pub fn pick<T>(&self, full: T, quick: T) -> T {
        if self.quick { quick } else { full }
    }

    /// Pairs of measurements side by side.
    pub fn pairs(&self) -> usize {
        self.pick(5, 2)
    }

    /// Prints a row and keeps it.
    pub fn add(&self, row: Row) {
        let cells = row.cells.iter().map(|(column, shown)| format!("{column}: {}", shown.as_str().unwrap_or_default()));
        println!("{:<12} {}", row.table, cells.collect::<Vec<_>>().join(" · "));
        let line = json!({
            "table": row.table, "begun": self.begun, "quick": self.quick, "cells": row.cells, "figures": row.figures,
        });
        let directory = self.file.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(directory).expect("the directory of the results");
        let mut file = OpenOptions::new().create(true).append(true).open(&self.file).expect("the file of the results");
        writeln!(file, "{line}").expect("the results are written");
    }
}

/// The rows of `table` from the last invocation that has any.
pub fn last_rows(lines: &[Value], table: &str) -> Vec<Value> {
    let of_table = || lines.iter().filter(|line| line["table"] == table);
    let last = of_table().filter_map(|line| line["begun"].as_u64()).max();
    of_table().filter(|line| line["begun"].as_u64() == last).cloned().collect()
}

/// All lines of a file of results.
pub fn read(file: &Path) -> Vec<Value> {
    let text = fs::read_to_string(file).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// `1,234` and `0.1234`: as many digits as say something.
pub fn shown(figure: f64) -> String {
    if figure < 10.0 {
        return format!("{figure:.2}");
    }
    if figure < 100.0 {
        return format!("{figure:.1}");
    }
    let digits = format!("{figure:.0}");
    let mut grouped = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at) % 3 == 0 {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}
