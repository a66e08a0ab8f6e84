//! What the commands read: JSON lines or plain text, from a file or standard input, one record at a
//! time.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, stdin};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, bail};
use serde::Deserialize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// One JSON value a line: a string, {"text": …} or {"query": …, "passages": [… or {"text": …}]}
    Jsonl,
    /// One text a line; empty lines are skipped
    Text,
}

#[derive(clap::Args)]
pub struct InputArgs {
    /// File of texts, `-` for standard input
    #[arg(long, short, value_name = "FILE")]
    pub input: PathBuf,

    /// Format of the input [default: by extension .txt or .jsonl; jsonl from standard input]
    #[arg(long)]
    pub format: Option<Format>,
}

/// One line of input.
#[derive(Debug, PartialEq)]
pub struct Record {
    /// Counted from 1.
    pub line: usize,
    pub content: Content,
}

#[derive(Debug, PartialEq)]
pub enum Content {
    Text(String),
    Pairs {
        query: String,
        passages: Vec<String>,
    },
}

/// A line as JSON has it.
#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Plain(String),
    Object {
        text: Option<String>,
        query: Option<String>,
        passages: Option<Vec<Passage>>,
    },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Passage {
    Plain(String),
    Object { text: String },
}

impl InputArgs {
    fn format(&self) -> anyhow::Result<Format> {
        if let Some(format) = self.format {
            return Ok(format);
        }
        if self.is_stdin() {
            return Ok(Format::Jsonl);
        }
        match self
            .input
            .extension()
            .and_then(|extension| extension.to_str())
        {
            Some("jsonl" | "json" | "ndjson") => Ok(Format::Jsonl),
            Some("txt" | "text") => Ok(Format::Text),
            _ => bail!(
                "cannot tell the format of {} by its extension: give --format",
                self.input.display()
            ),
        }
    }

    fn is_stdin(&self) -> bool {
        self.input == Path::new("-")
    }

    pub fn open(&self) -> anyhow::Result<Records> {
        let format = self.format()?;
        let (source, bytes): (Box<dyn Read>, _) = if self.is_stdin() {
            (Box::new(stdin()), None)
        } else {
            let open = || {
                let file = File::open(&self.input)?;
                let bytes = file.metadata()?.len();
                Ok::<_, std::io::Error>((file, bytes))
            };
            let (file, bytes) =
                open().with_context(|| format!("cannot read {}", self.input.display()))?;
            (Box::new(file), Some(bytes))
        };
        let read = Arc::new(AtomicU64::new(0));
        let source = Counted {
            source,
            read: read.clone(),
        };
        Ok(Records {
            reader: BufReader::new(source),
            format,
            line: 0,
            read,
            bytes,
        })
    }
}

/// Counts what is read, for the progress bar.
struct Counted {
    source: Box<dyn Read>,
    read: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let bytes = self.source.read(buffer)?;
        self.read.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(bytes)
    }
}

/// The records of an input, in order; an error names its line.
pub struct Records {
    reader: BufReader<Counted>,
    format: Format,
    line: usize,
    read: Arc<AtomicU64>,
    bytes: Option<u64>,
}

impl Records {
    /// Size of the input in bytes, where it is a file.
    pub fn bytes(&self) -> Option<u64> {
        self.bytes
    }

    /// Bytes read so far.
    pub fn bytes_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    fn parse(&self, line: &str) -> anyhow::Result<Content> {
        if self.format == Format::Text {
            return Ok(Content::Text(line.to_owned()));
        }
        // Two steps: what is no JSON gets the parser's own message, with its column.
        let value: serde_json::Value = serde_json::from_str(line)?;
        match serde_json::from_value(value) {
            Ok(Line::Plain(text)) => Ok(Content::Text(text)),
            Ok(Line::Object {
                text: Some(text),
                query: None,
                passages: None,
            }) => Ok(Content::Text(text)),
            Ok(Line::Object {
                text: None,
                query: Some(query),
                passages: Some(passages),
            }) => {
                let text = |passage| match passage {
                    Passage::Plain(text) | Passage::Object { text } => text,
                };
                Ok(Content::Pairs {
                    query,
                    passages: passages.into_iter().map(text).collect(),
                })
            }
            _ => bail!(
                "expected a string, {{\"text\": string}} or \
                 {{\"query\": string, \"passages\": [string]}}"
            ),
        }
    }
}

impl Iterator for Records {
    type Item = anyhow::Result<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut text = Vec::new();
        loop {
            text.clear();
            self.line += 1;
            let line = self.line;
            let at_line = || format!("line {line}");
            match self.reader.read_until(b'\n', &mut text) {
                Ok(0) => return None,
                Ok(_) => {}
                Err(error) => return Some(Err(error).with_context(at_line)),
            }
            let text = match std::str::from_utf8(&text) {
                Ok(text) => text.trim_end_matches(['\r', '\n']),
                Err(error) => return Some(Err(error).with_context(at_line)),
            };
            if text.trim().is_empty() {
                continue;
            }
            let record = self.parse(text).map(|content| Record { line, content });
            return Some(record.with_context(at_line));
        }
    }
}
