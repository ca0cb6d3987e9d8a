//! SPDX licence expressions (SPDX 2.3, annex D), as far as `Cargo.toml` uses them.
//!
//! `OR` binds weaker than `AND`, which binds weaker than `WITH`. The old form with a slash means `OR`.

/// A licence expression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expression {
    /// One licence, with its exception if it names one: `Apache-2.0 WITH LLVM-exception`.
    Licence(String),
    /// All of these apply.
    And(Vec<Expression>),
    /// The user chooses one of these.
    Or(Vec<Expression>),
}

impl Expression {
    /// Reads an expression; the error says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let spaced = text
            .replace('(', " ( ")
            .replace(')', " ) ")
            .replace('/', " OR ");
        let tokens: Vec<&str> = spaced.split_whitespace().collect();
        let mut parser = Parser { tokens: &tokens };
        let expression = parser.or()?;
        match parser.tokens {
            [] => Ok(expression),
            [token, ..] => Err(format!("`{token}` is not expected in `{text}`")),
        }
    }

    /// Whether a choice exists in which every licence that applies is acceptable.
    pub fn is_satisfied(&self, accept: &impl Fn(&str) -> bool) -> bool {
        match self {
            Self::Licence(name) => accept(name),
            Self::And(parts) => parts.iter().all(|part| part.is_satisfied(accept)),
            Self::Or(parts) => parts.iter().any(|part| part.is_satisfied(accept)),
        }
    }
}

struct Parser<'a> {
    tokens: &'a [&'a str],
}

impl<'a> Parser<'a> {
    fn take(&mut self, token: &str) -> bool {
        let found = self.tokens.first() == Some(&token);
        if found {
            self.tokens = &self.tokens[1..];
        }
        found
    }

    fn name(&mut self) -> Result<&'a str, String> {
        match self.tokens {
            [name, rest @ ..] if !["(", ")", "AND", "OR", "WITH"].contains(name) => {
                self.tokens = rest;
                Ok(name)
            }
            [token, ..] => Err(format!("a licence was expected where `{token}` stands")),
            [] => Err("a licence was expected at the end".to_owned()),
        }
    }

    fn or(&mut self) -> Result<Expression, String> {
        let mut parts = vec![self.and()?];
        while self.take("OR") {
            parts.push(self.and()?);
        }
        Ok(if parts.len() == 1 {
            parts.remove(0)
        } else {
            Expression::Or(parts)
        })
    }

    fn and(&mut self) -> Result<Expression, String> {
        let mut parts = vec![self.single()?];
        while self.take("AND") {
            parts.push(self.single()?);
        }
        Ok(if parts.len() == 1 {
            parts.remove(0)
        } else {
            Expression::And(parts)
        })
    }

    fn single(&mut self) -> Result<Expression, String> {
        if self.take("(") {
            let inner = self.or()?;
            return if self.take(")") {
                Ok(inner)
            } else {
                Err("a `)` is missing".to_owned())
            };
        }
        let name = self.name()?;
        let licence = if self.take("WITH") {
            format!("{name} WITH {}", self.name()?)
        } else {
            name.to_owned()
        };
        Ok(Expression::Licence(licence))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holds(text: &str, accepted: &[&str]) -> bool {
        Expression::parse(text)
            .unwrap()
            .is_satisfied(&|name| accepted.contains(&name))
    }

    #[test]
    fn a_choice_needs_one_and_a_sum_needs_all() {
        assert!(holds("MIT OR GPL-3.0-only", &["MIT"]));
        assert!(holds("MIT/Apache-2.0", &["Apache-2.0"]));
        assert!(!holds("MIT AND GPL-3.0-only", &["MIT"]));
        assert!(holds(
            "(MIT OR Apache-2.0) AND Unicode-3.0",
            &["MIT", "Unicode-3.0"]
        ));
        assert!(!holds(
            "(MIT OR Apache-2.0) AND Unicode-3.0",
            &["MIT", "Apache-2.0"]
        ));
    }

    #[test]
    fn and_binds_stronger_than_or() {
        assert!(holds("MIT OR ISC AND GPL-3.0-only", &["MIT"]));
        assert!(!holds("MIT OR ISC AND GPL-3.0-only", &["ISC"]));
    }

    #[test]
    fn an_exception_belongs_to_its_licence() {
        assert!(!holds(
            "GPL-2.0-only WITH Classpath-exception-2.0",
            &["GPL-2.0-only"]
        ));
        assert!(holds("Apache-2.0 WITH LLVM-exception OR MIT", &["MIT"]));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "",
            "MIT OR",
            "(MIT",
            "MIT)",
            "MIT Apache-2.0",
            "AND MIT",
            "MIT WITH",
            "()",
        ] {
            assert!(Expression::parse(text).is_err(), "{text}");
        }
    }
}
