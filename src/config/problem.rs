//! What is wrong with a file: the place, the line, and what to write instead.

use std::cell::RefCell;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Most problems that one file is told of; the rest are counted.
const MOST: usize = 100;
/// Longest part of a source line that is shown, in characters.
const LINE: usize = 120;

/// Longest text of a problem, in characters.
const LONGEST: usize = 400;

/// Everything that is wrong with a file, in the order of the file. Never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Errors {
    problems: Vec<Problem>,
    left_out: usize,
}

/// One thing that is wrong, or doubtful, in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Whether the file can be used all the same.
    pub severity: Severity,
    /// The file.
    pub path: PathBuf,
    /// Where in the file; `None`: the file as a whole.
    pub place: Option<Place>,
    /// What is wrong, without a full stop.
    pub what: String,
    /// What to do: begins with `write` where something is to be written.
    pub hint: String,
}

/// Whether a file with this problem can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// It can't.
    Error,
    /// It can, but it hardly says what was meant.
    Warning,
}

/// A place in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// The line as it is shown: without control characters, shortened where it is long.
    pub text: String,
    /// The characters of `text` that the problem is about; at least one, and at most one past
    /// the end of `text`.
    pub caret: Range<usize>,
}

impl Errors {
    /// The problems of a file in the order of its lines; `Ok` with the warnings where none of
    /// them is an error.
    pub(super) fn among(source: &Source, mut drafts: Vec<Draft>) -> Result<Vec<Problem>, Self> {
        drafts.sort_by_key(|draft| (draft.span.start, draft.span.end));
        let any_error = drafts.iter().any(|draft| draft.severity == Severity::Error);
        if any_error {
            // Where there are too many, an error matters more than a warning before it.
            let errors = drafts.iter().filter(|draft| draft.severity == Severity::Error).count();
            if errors >= MOST {
                drafts.retain(|draft| draft.severity == Severity::Error);
            }
        }
        let left_out = drafts.len().saturating_sub(MOST);
        drafts.truncate(MOST);
        let problems = drafts.into_iter().map(|draft| source.problem(draft)).collect();
        if any_error { Err(Self { problems, left_out }) } else { Ok(problems) }
    }

    /// The file as a whole can't be used.
    pub(super) fn whole(path: &Path, what: String, hint: &str) -> Self {
        let problem = Problem {
            severity: Severity::Error,
            path: path.to_owned(),
            place: None,
            what,
            hint: hint.to_owned(),
        };
        Self { problems: vec![problem], left_out: 0 }
    }

    /// Each of them, warnings too; at most a hundred.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// How many more there are than [`Errors::problems`] lists.
    pub fn left_out(&self) -> usize {
        self.left_out
    }

    /// As `baton check --json` gives them.
    pub fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "problems": self.problems.iter().map(Problem::json).collect::<Vec<_>>(),
            "left_out": self.left_out,
        })
    }
}

impl std::error::Error for Errors {}

impl fmt::Display for Errors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write!(f, "{problem}")?;
        }
        match self.left_out {
            0 => Ok(()),
            more => write!(f, "\n… and {more} more"),
        }
    }
}

impl Problem {
    /// As `baton check --json` gives it; `line` and `column` are null without a place.
    pub fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "severity": self.severity.to_string(),
            "file": self.path.display().to_string(),
            "line": self.place.as_ref().map(|place| place.line),
            "column": self.place.as_ref().map(|place| place.column),
            "what": self.what,
            "hint": self.hint,
        })
    }

    /// `FILE:LINE:COLUMN`, or the file alone.
    pub fn location(&self) -> String {
        match &self.place {
            Some(place) => format!("{}:{}:{}", self.path.display(), place.line, place.column),
            None => self.path.display().to_string(),
        }
    }
}

/// Four lines, or two without a place; no newline at the end:
///
/// ```text
/// relay1.toml:9:12: error: `priority` is 300, outside 1 to 255
///   9 | priority = 300
///     |            ^^^
///   write a number from 1 to 255
/// ```
impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {}: {}", self.location(), self.severity, self.what)?;
        if let Some(place) = &self.place {
            let number = place.line.to_string();
            writeln!(f, "  {number} | {}", place.text)?;
            let indent = " ".repeat(place.caret.start);
            let carets = "^".repeat(place.caret.len());
            writeln!(f, "  {:width$} | {indent}{carets}", "", width = number.len())?;
        }
        write!(f, "  {}", self.hint)
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Severity::Error => "error",
            Severity::Warning => "warning",
        })
    }
}

/// A problem before its place is looked up.
#[derive(Debug)]
pub(super) struct Draft {
    pub(super) severity: Severity,
    pub(super) span: Range<usize>,
    pub(super) what: String,
    pub(super) hint: String,
}

/// What has been found wrong so far, in no order.
#[derive(Debug, Default)]
pub(super) struct Report {
    drafts: RefCell<Vec<Draft>>,
}

impl Report {
    /// Bytes `span` make the file unusable.
    pub(super) fn error(
        &self,
        span: &Range<usize>,
        what: impl Into<String>,
        hint: impl Into<String>,
    ) {
        self.add(Severity::Error, span, what.into(), hint.into());
    }

    /// Bytes `span` hardly say what was meant.
    pub(super) fn warning(
        &self,
        span: &Range<usize>,
        what: impl Into<String>,
        hint: impl Into<String>,
    ) {
        self.add(Severity::Warning, span, what.into(), hint.into());
    }

    /// Whether anything made the file unusable so far.
    pub(super) fn any_error(&self) -> bool {
        self.drafts.borrow().iter().any(|draft| draft.severity == Severity::Error)
    }

    fn add(&self, severity: Severity, span: &Range<usize>, what: String, hint: String) {
        let (what, hint) = (plain(&what), plain(&hint));
        self.drafts.borrow_mut().push(Draft { severity, span: span.clone(), what, hint });
    }

    pub(super) fn into_drafts(self) -> Vec<Draft> {
        self.drafts.into_inner()
    }
}

/// A file's name and text: turns byte ranges into places.
#[derive(Debug, Clone)]
pub(super) struct Source {
    path: PathBuf,
    text: Arc<str>,
}

impl Source {
    pub(super) fn new(path: &Path, text: &str) -> Self {
        Self { path: path.to_owned(), text: text.into() }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn text(&self) -> &str {
        &self.text
    }

    fn problem(&self, draft: Draft) -> Problem {
        let Draft { severity, span, what, hint } = draft;
        Problem { severity, path: self.path.clone(), place: Some(self.place(&span)), what, hint }
    }

    fn place(&self, span: &Range<usize>) -> Place {
        let text: &str = &self.text;
        let start = text.floor_char_boundary(span.start);
        let end = text.floor_char_boundary(span.end).max(start);
        let line_start = text[..start].rfind('\n').map_or(0, |at| at + 1);
        let line_end = text[start..].find('\n').map_or(text.len(), |at| start + at);
        let line = &text[line_start..line_end];

        let before = text[line_start..start].chars().count();
        let length = text[start..end.min(line_end)].chars().count().max(1);
        let (shown, caret) = window(line.trim_end_matches('\r'), before, length);
        Place {
            line: text[..line_start].matches('\n').count() + 1,
            column: before + 1,
            text: shown,
            caret,
        }
    }
}

/// Text of the file as a terminal may show it: no control characters, and not without end.
fn plain(text: &str) -> String {
    text.chars()
        .take(LONGEST)
        .map(|c| match c {
            '\t' => ' ',
            c if c.is_control() => char::REPLACEMENT_CHARACTER,
            c => c,
        })
        .collect()
}

/// The part of a line around the characters that matter, and where these are in it.
fn window(line: &str, before: usize, length: usize) -> (String, Range<usize>) {
    let from =
        if before + length.min(LINE / 2) > LINE { before.saturating_sub(LINE / 2) } else { 0 };
    let shown: String = line.chars().skip(from).take(LINE).collect();
    let mut shown = plain(&shown);
    shown.truncate(shown.trim_end().len());
    let start = before - from;
    let end = (start + length).min(shown.chars().count()).max(start + 1);
    (shown, start..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(text: &str, span: Range<usize>) -> String {
        let source = Source::new(Path::new("f.toml"), text);
        let report = Report::default();
        report.error(&span, "it is wrong", "write it right");
        Errors::among(&source, report.into_drafts()).expect_err("an error").to_string()
    }

    #[test]
    fn the_caret_stands_under_the_characters() {
        let text = "a = 1\r\n\tb = \"é\"  # ü\r\n";
        let start = text.find("\"é\"").expect("there");
        let expected = "f.toml:2:6: error: it is wrong\n  2 |  b = \"é\"  # ü\n    |      ^^^\n  write it right";
        assert_eq!(told(text, start..start + 4), expected);
    }

    #[test]
    fn a_place_at_the_end_or_past_it_or_amid_a_character_is_one() {
        for span in [3..3, 3..9, 2..3, 90..100] {
            let told = told("a\né", span.clone());
            assert!(told.starts_with("f.toml:2:"), "{span:?} {told}");
            assert!(told.contains("| é\n"), "{span:?} {told}");
        }
        assert!(told("", 0..0).starts_with("f.toml:1:1: error"));
    }

    #[test]
    fn of_a_long_line_the_part_that_matters_is_shown() {
        let text = format!("{} here {}", "x".repeat(1000), "y".repeat(1000));
        let told = told(&text, 1001..1005);
        let lines: Vec<&str> = told.lines().collect();
        assert_eq!(lines[0], "f.toml:1:1002: error: it is wrong");
        assert!(lines[1].chars().count() <= LINE + 8, "{told}");
        let at = lines[2].find("^^^^").expect("a caret");
        assert_eq!(&lines[1][at..at + 4], "here");
    }

    #[test]
    fn warnings_alone_are_no_errors_and_come_in_the_order_of_the_file() {
        let source = Source::new(Path::new("f.toml"), "a\nb\n");
        let report = Report::default();
        report.warning(&(2..3), "second", "write");
        report.warning(&(0..1), "first", "write");
        let warnings = Errors::among(&source, report.into_drafts()).expect("no error");
        let order: Vec<_> = warnings.iter().map(|warning| warning.what.as_str()).collect();
        assert_eq!(order, ["first", "second"]);
    }
}
