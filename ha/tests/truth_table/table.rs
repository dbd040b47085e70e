//! The table, as docs/failover.md has it.

use crate::situation::{COLUMNS, Situation};

/// What the heading of the table begins with.
const HEADING: &str = "| a | b |";

/// A row: what it matches, and who is Active then.
#[derive(Debug)]
pub(crate) struct Row {
    /// What may stand in each column; empty: anything.
    cells: [Vec<String>; COLUMNS],
    pub(crate) actives: [bool; 2],
}

/// The rows, in their order.
pub(crate) fn parse(document: &str) -> Vec<Row> {
    let mut lines = document.lines().skip_while(|line| !line.starts_with(HEADING));
    let heading = lines.next().expect("docs/failover.md has the table");
    assert_eq!(cells(heading).len(), COLUMNS + 2, "{heading}");
    lines.skip(1).take_while(|line| line.starts_with('|')).map(row).collect()
}

fn cells(line: &str) -> Vec<&str> {
    line.trim().trim_matches('|').split('|').map(str::trim).collect()
}

fn row(line: &str) -> Row {
    let cells = cells(line);
    assert_eq!(cells.len(), COLUMNS + 2, "{line}");
    assert!(!cells[COLUMNS + 1].is_empty(), "a row says why: {line}");
    let actives = match cells[COLUMNS] {
        "**a**" => [true, false],
        "**b**" => [false, true],
        "**both**" => [true, true],
        "**nobody**" => [false, false],
        _ => panic!("who is Active? {line}"),
    };
    let cells = std::array::from_fn(|at| {
        let words = ["ok", "lost", "link", "dead", "ended"];
        let cell: Vec<String> = match cells[at] {
            "" => Vec::new(),
            cell => cell.split(" or ").map(str::to_owned).collect(),
        };
        assert!(cell.iter().all(|word| words.contains(&word.as_str())), "{cell:?}: {line}");
        cell
    });
    Row { cells, actives }
}

/// The first row that matches.
pub(crate) fn row_of(rows: &[Row], situation: &Situation) -> Option<usize> {
    rows.iter().position(|row| {
        let matches =
            |cell: &[String], found| cell.is_empty() || cell.iter().any(|may| may == found);
        row.cells.iter().zip(situation.0).all(|(cell, found)| matches(cell, found))
    })
}
