//! Reading tables key by key: what is taken is checked for its type, what is left over is unknown.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::ops::{Range, RangeInclusive};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::mistake::{Mistake, Mistakes, place};
use crate::kinds::list;
use crate::spec::Id;

/// Where mistakes are collected.
#[derive(Default)]
pub(super) struct Sink(Vec<(Range<usize>, String, String)>);

impl Sink {
    /// A mistake at `span`, in the value of `key`.
    pub fn add(&mut self, span: Range<usize>, key: &str, message: impl Into<String>) {
        self.0.push((span, key.to_owned(), message.into()));
    }

    /// `value`, if there was no mistake.
    pub fn into_result<T>(mut self, value: T, text: &str, file: &str) -> Result<T, Mistakes> {
        if self.0.is_empty() {
            return Ok(value);
        }
        self.0.sort_by_key(|(span, _, _)| span.start);
        let list = self.0.into_iter().map(|(span, key, message)| {
            let (line, column) = place(text, span.start);
            Mistake {
                line,
                column,
                key,
                message,
            }
        });
        Err(Mistakes {
            file: file.to_owned(),
            list: list.collect(),
        })
    }
}

/// A table, and which of its keys were taken.
pub(super) struct Section<'a> {
    path: String,
    span: Range<usize>,
    table: &'a DeTable<'a>,
    known: Vec<String>,
}

impl<'a> Section<'a> {
    /// The whole file.
    pub fn root(document: &'a Spanned<DeTable<'a>>) -> Self {
        Self::new(String::new(), document.span(), document.get_ref())
    }

    /// A table that stands at `path`.
    pub fn new(path: String, span: Range<usize>, table: &'a DeTable<'a>) -> Self {
        Self {
            path,
            span,
            table,
            known: Vec::new(),
        }
    }

    /// Where the table stands.
    pub fn span(&self) -> Range<usize> {
        self.span.clone()
    }

    /// A key of this table, from the root.
    pub fn key(&self, name: &str) -> String {
        if self.path.is_empty() {
            name.to_owned()
        } else {
            format!("{}.{name}", self.path)
        }
    }

    /// Whether a key is there.
    pub fn has(&self, name: &str) -> bool {
        self.table.contains_key(name)
    }

    /// Where the value of a key stands, or the table, where it is not there.
    pub fn place(&self, name: &str) -> Range<usize> {
        self.table.get(name).map_or(self.span(), Spanned::span)
    }

    /// Says nothing of these keys.
    pub fn known(&mut self, names: &[&str]) {
        self.known
            .extend(names.iter().map(|name| (*name).to_owned()));
    }

    /// Says nothing of the keys that are left.
    pub fn pass_over(&mut self) {
        let rest = self.rest().into_iter().map(|(name, ..)| name);
        self.known.extend(rest.collect::<Vec<_>>());
    }

    fn take(&mut self, name: &str) -> Option<&'a Spanned<DeValue<'a>>> {
        self.known.push(name.to_owned());
        self.table.get(name)
    }

    fn wrong(
        &self,
        name: &str,
        value: &Spanned<DeValue<'_>>,
        wanted: impl Display,
        sink: &mut Sink,
    ) {
        let found = value.get_ref().type_str();
        sink.add(
            value.span(),
            &self.key(name),
            format!("{wanted} is wanted, not {found}"),
        );
    }

    fn missing(&self, name: &str, allowed: impl Display, sink: &mut Sink) {
        sink.add(
            self.span(),
            &self.key(name),
            format!("missing; allowed: {allowed}"),
        );
    }

    /// A table inside.
    pub fn section(&mut self, name: &str, sink: &mut Sink) -> Option<Section<'a>> {
        let value = self.take(name)?;
        match value.get_ref().as_table() {
            Some(table) => Some(Section::new(self.key(name), value.span(), table)),
            None => {
                self.wrong(name, value, format!("a table, [{}],", self.key(name)), sink);
                None
            }
        }
    }

    /// The tables inside a table, by their IDs: `[volume.disk0]`.
    pub fn named_sections(&mut self, name: &str, sink: &mut Sink) -> Vec<(Id, Section<'a>)> {
        let Some(outer) = self.section(name, sink) else {
            return Vec::new();
        };
        let mut sections = Vec::new();
        for (key, value) in outer.table {
            let path = outer.key(key.get_ref());
            match (key.get_ref().parse::<Id>(), value.get_ref().as_table()) {
                (Ok(id), Some(table)) => sections.push((id, Section::new(path, key.span(), table))),
                (Ok(_), None) => {
                    outer.wrong(key.get_ref(), value, format!("a table, [{path}],"), sink);
                }
                (Err(error), _) => sink.add(key.span(), &path, error.to_string()),
            }
        }
        // In the order of the file, in which a reader would call the second of two the duplicate.
        sections.sort_by_key(|(_, section)| section.span.start);
        sections
    }

    /// The IDs of the tables inside a table, also of those with mistakes.
    pub fn names(&self, name: &str) -> BTreeSet<Id> {
        let outer = self
            .table
            .get(name)
            .and_then(|value| value.get_ref().as_table());
        outer
            .into_iter()
            .flatten()
            .filter_map(|(key, _)| key.get_ref().parse().ok())
            .collect()
    }

    /// An array.
    pub fn array(&mut self, name: &str, sink: &mut Sink) -> Option<&'a [Spanned<DeValue<'a>>]> {
        let value = self.take(name)?;
        let array = value.get_ref().as_array();
        if array.is_none() {
            self.wrong(name, value, "an array", sink);
        }
        array.map(|array| &**array)
    }

    /// Text.
    pub fn text(&mut self, name: &str, sink: &mut Sink) -> Option<Spanned<String>> {
        let value = self.take(name)?;
        let text = value
            .get_ref()
            .as_str()
            .map(|text| Spanned::new(value.span(), text.to_owned()));
        if text.is_none() {
            self.wrong(name, value, "text", sink);
        }
        text
    }

    /// Text that must be there.
    pub fn required_text(
        &mut self,
        name: &str,
        allowed: &str,
        sink: &mut Sink,
    ) -> Option<Spanned<String>> {
        if !self.table.contains_key(name) {
            self.missing(name, allowed, sink);
        }
        self.text(name, sink)
    }

    /// One of several words.
    pub fn word<T: Copy>(&mut self, name: &str, words: &[(&str, T)], sink: &mut Sink) -> Option<T> {
        let text = self.text(name, sink)?;
        let found = words.iter().find(|(word, _)| word == text.get_ref());
        if found.is_none() {
            let allowed = list(words.iter().map(|(word, _)| *word));
            let message = format!("unknown word `{}`; allowed: {allowed}", text.get_ref());
            sink.add(text.span(), &self.key(name), message);
        }
        found.map(|(_, value)| *value)
    }

    /// One of several words; it must be there.
    pub fn required_word<T: Copy>(
        &mut self,
        name: &str,
        words: &[(&str, T)],
        sink: &mut Sink,
    ) -> Option<T> {
        if !self.table.contains_key(name) {
            self.missing(name, list(words.iter().map(|(word, _)| *word)), sink);
        }
        self.word(name, words, sink)
    }

    /// `true` or `false`.
    pub fn boolean(&mut self, name: &str, sink: &mut Sink) -> Option<bool> {
        let value = self.take(name)?;
        let found = value.get_ref().as_bool();
        if found.is_none() {
            self.wrong(name, value, "`true` or `false`", sink);
        }
        found
    }

    /// A whole number within bounds.
    pub fn integer<T>(&mut self, name: &str, range: RangeInclusive<T>, sink: &mut Sink) -> Option<T>
    where
        T: TryFrom<i64> + PartialOrd + Display + Copy,
    {
        let value = self.take(name)?;
        let wanted = format!("a whole number from {} to {}", range.start(), range.end());
        let Some(number) = value.get_ref().as_integer() else {
            self.wrong(name, value, wanted, sink);
            return None;
        };
        let number = i64::from_str_radix(number.as_str(), number.radix()).ok();
        let number = number
            .and_then(|number| T::try_from(number).ok())
            .filter(|number| range.contains(number));
        if number.is_none() {
            sink.add(value.span(), &self.key(name), format!("{wanted} is wanted"));
        }
        number
    }

    /// Every key that was not taken yet, with the place of its value.
    pub fn rest(&self) -> Vec<(String, Range<usize>, &'a Spanned<DeValue<'a>>)> {
        let left = self
            .table
            .iter()
            .filter(|(key, _)| !self.known.iter().any(|known| known == key.get_ref()));
        left.map(|(key, value)| (key.get_ref().clone().into_owned(), key.span(), value))
            .collect()
    }

    /// What was not taken is unknown.
    pub fn finish(self, sink: &mut Sink) {
        for (name, span, _) in self.rest() {
            let allowed = list(self.known.iter().map(String::as_str));
            sink.add(
                span,
                &self.key(&name),
                format!("unknown key; allowed: {allowed}"),
            );
        }
    }
}
