//! Aligned tables for the terminal: `baton check`, `baton status`, drills.

use std::fmt;

/// Columns with a heading and as many rows as are added.
///
/// Two spaces part the columns. A column in which every cell is a number (or empty, or `-`) is
/// right-aligned; no line ends in a space. Widths count characters, control characters are shown
/// as `�`, so a cell never breaks the table.
#[derive(Debug, Clone)]
pub struct Table {
    headings: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table without rows.
    pub fn new(headings: &[&str]) -> Self {
        Self { headings: headings.iter().copied().map(str::to_owned).collect(), rows: Vec::new() }
    }

    /// Adds a row. Cells that are missing are empty, those past the last column are left out.
    pub fn row<T: fmt::Display>(&mut self, cells: impl IntoIterator<Item = T>) -> &mut Self {
        let mut row: Vec<String> = cells
            .into_iter()
            .take(self.headings.len())
            .map(|cell| cell.to_string().replace(char::is_control, "\u{FFFD}"))
            .collect();
        row.resize(self.headings.len(), String::new());
        self.rows.push(row);
        self
    }

    /// Whether it has no rows.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
}

/// Every line ends in a newline.
impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns: Vec<(usize, bool)> = (0..self.headings.len())
            .map(|column| {
                let cells = self.rows.iter().map(|row| row[column].as_str());
                let width = cells.clone().chain([self.headings[column].as_str()]).map(width).max();
                let filled = cells.clone().any(is_number);
                let right = filled && cells.clone().all(|cell| is_blank(cell) || is_number(cell));
                (width.unwrap_or(0), right)
            })
            .collect();
        for row in std::iter::once(&self.headings).chain(&self.rows) {
            let mut line = String::new();
            for (cell, (columns_width, right)) in row.iter().zip(&columns) {
                let padding = " ".repeat(columns_width - width(cell));
                let (before, after) =
                    if *right { (padding, String::new()) } else { (String::new(), padding) };
                line.push_str(&before);
                line.push_str(cell);
                line.push_str(&after);
                line.push_str("  ");
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

fn width(cell: &str) -> usize {
    cell.chars().count()
}

fn is_blank(cell: &str) -> bool {
    cell.is_empty() || cell == "-"
}

/// A number as people write it: digits, with separators, a sign or a percent sign.
fn is_number(cell: &str) -> bool {
    cell.contains(|c: char| c.is_ascii_digit())
        && cell.trim_end_matches('%').chars().all(|c| c.is_ascii_digit() || ".,+-".contains(c))
        && cell.matches('.').count() <= 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_numbers_to_the_right_and_no_line_ends_in_a_space() {
        let mut table = Table::new(&["NAME", "WEIGHT", "NOTE"]);
        table.row(["a", "1", "x"]).row(["longer", "100", ""]).row(["b", "-", "y"]);
        let expected = "NAME    WEIGHT  NOTE\n\
                        a            1  x\n\
                        longer     100\n\
                        b            -  y\n";
        assert_eq!(table.to_string(), expected);
    }

    #[test]
    fn addresses_and_words_stay_left() {
        let mut table = Table::new(&["ADDRESS", "N"]);
        table.row(["10.0.0.1", "2.5"]).row(["10.0.0.20", "30%"]);
        assert_eq!(table.to_string(), "ADDRESS      N\n10.0.0.1   2.5\n10.0.0.20  30%\n");
    }

    #[test]
    fn rows_of_any_shape_fit() {
        let mut table = Table::new(&["A", "BÄ"]);
        assert!(table.is_empty());
        table.row(["ü"]).row(["1", "2", "3"]).row(["a\nb\u{1b}", ""]);
        assert_eq!(table.to_string(), "A     BÄ\nü\n1      2\na\u{FFFD}b\u{FFFD}\n");
    }
}
