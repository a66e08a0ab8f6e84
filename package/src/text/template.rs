//! Texts with placeholders.

use std::str::FromStr;

use super::TextError;

/// A text with placeholders `{text}`, `{query}`, `{passage}` and `{instruction}`; `{{` and `}}` are
/// plain braces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    pieces: Vec<Piece>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Literal(String),
    Text,
    Query,
    Passage,
    Instruction,
}

/// What fills a template.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fields<'a> {
    /// A text on its own.
    pub text: Option<&'a str>,
    /// The query of a pair.
    pub query: Option<&'a str>,
    /// The passage of a pair.
    pub passage: Option<&'a str>,
    /// What the texts are embedded for.
    pub instruction: Option<&'a str>,
}

impl Template {
    /// Fills the placeholders.
    ///
    /// # Errors
    ///
    /// [`TextError::MissingField`].
    pub fn render(&self, fields: Fields<'_>) -> Result<String, TextError> {
        let mut text = String::new();
        for piece in &self.pieces {
            let (placeholder, field) = match piece {
                Piece::Literal(literal) => {
                    text.push_str(literal);
                    continue;
                }
                Piece::Text => ("text", fields.text),
                Piece::Query => ("query", fields.query),
                Piece::Passage => ("passage", fields.passage),
                Piece::Instruction => ("instruction", fields.instruction),
            };
            text.push_str(field.ok_or(TextError::MissingField { placeholder })?);
        }
        Ok(text)
    }
}

impl FromStr for Template {
    type Err = TextError;

    fn from_str(template: &str) -> Result<Self, TextError> {
        let unpaired = || TextError::UnpairedBrace {
            template: template.to_owned(),
        };
        let mut pieces = Vec::new();
        let mut literal = String::new();
        let mut rest = template;
        while let Some(brace) = rest.find(['{', '}']) {
            literal.push_str(&rest[..brace]);
            let (plain, after) = (&rest[brace..=brace], &rest[brace + 1..]);
            if let Some(after) = after.strip_prefix(plain) {
                literal.push_str(plain);
                rest = after;
                continue;
            }
            if plain == "}" {
                return Err(unpaired());
            }
            let (name, after) = after.split_once('}').ok_or_else(unpaired)?;
            pieces.push(Piece::Literal(std::mem::take(&mut literal)));
            pieces.push(match name {
                "text" => Piece::Text,
                "query" => Piece::Query,
                "passage" => Piece::Passage,
                "instruction" => Piece::Instruction,
                _ => {
                    let name = name.to_owned();
                    return Err(TextError::UnknownPlaceholder { name });
                }
            });
            rest = after;
        }
        literal.push_str(rest);
        pieces.push(Piece::Literal(literal));
        Ok(Self { pieces })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAIR: Fields<'_> = Fields {
        text: None,
        query: Some("q"),
        passage: Some("p"),
        instruction: None,
    };

    fn render(template: &str) -> Result<String, TextError> {
        template.parse::<Template>()?.render(PAIR)
    }

    #[test]
    fn templates_fill_their_placeholders() {
        assert_eq!(render("{query}|{passage}!").unwrap(), "q|p!");
        assert_eq!(render("{{query}} {query}").unwrap(), "{query} q");
        assert_eq!(render("").unwrap(), "");
    }

    #[test]
    fn templates_refuse_what_they_do_not_know() {
        let message = |template: &str| render(template).unwrap_err().to_string();
        assert!(message("{doc}").starts_with("unknown placeholder {doc}"));
        assert!(message("{query").starts_with("unpaired brace"));
        assert!(message("query}").starts_with("unpaired brace"));
        assert!(message("{text}").contains("needs {text}"));
    }
}
