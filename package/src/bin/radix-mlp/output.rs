//! What the commands write: to standard output, or to a file that appears only when it is whole.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use npyz::WriterBuilder;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::Serialize;
use tempfile::NamedTempFile;

use super::interrupt;

/// A file beside the one to be written, which it replaces when it is whole and which is removed
/// otherwise; or standard output.
pub struct Destination {
    writer: Box<dyn Write>,
    file: Option<(NamedTempFile, PathBuf)>,
}

impl Destination {
    /// `-` is standard output.
    pub fn create(path: &Path) -> anyhow::Result<Self> {
        if path == Path::new("-") {
            let writer = Box::new(BufWriter::new(io::stdout()));
            return Ok(Self { writer, file: None });
        }
        let cannot_write = || format!("cannot write {}", path.display());
        let file = temporary(directory(path)).with_context(cannot_write)?;
        interrupt::remove_if_interrupted(file.path());
        Ok(Self {
            writer: Box::new(BufWriter::new(file.reopen()?)),
            file: Some((file, path.to_owned())),
        })
    }

    pub fn finish(mut self) -> anyhow::Result<()> {
        self.writer.flush()?;
        if let Some((file, path)) = self.file {
            file.as_file().sync_all()?;
            interrupt::finish(|| file.persist(&path))
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }
}

impl Write for Destination {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.writer.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

fn temporary(directory: &Path) -> io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".radix-mlp-");
    #[cfg(unix)]
    {
        // As any new file: the umask takes away what it should.
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(directory)
}

/// Did the reader of standard output go away?
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let cause = cause.downcast_ref::<io::Error>();
        cause.is_some_and(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
    })
}

/// Embeddings in one of three formats.
pub enum Embeddings {
    Jsonl(Destination),
    Npy(Spool),
    Safetensors(Spool),
}

/// One line of JSON output.
#[derive(Serialize)]
struct Line<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    passage: Option<usize>,
    embedding: &'a [f32],
}

impl Embeddings {
    /// The format is that of the extension; `-` is JSON lines on standard output.
    pub fn create(path: &Path) -> anyhow::Result<Self> {
        if path == Path::new("-") {
            return Ok(Self::Jsonl(Destination::create(path)?));
        }
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("jsonl") => Ok(Self::Jsonl(Destination::create(path)?)),
            Some("npy") => Ok(Self::Npy(Spool::create(path)?)),
            Some("safetensors") => Ok(Self::Safetensors(Spool::create(path)?)),
            _ => bail!(
                "cannot tell the format of {} by its extension: expected .npy, .jsonl or .safetensors",
                path.display()
            ),
        }
    }

    /// The embedding of record `index`, or of one of its passages. They come in order.
    pub fn write(
        &mut self,
        index: usize,
        passage: Option<usize>,
        embedding: &[f32],
    ) -> anyhow::Result<()> {
        match self {
            Self::Npy(spool) | Self::Safetensors(spool) => spool.write(embedding),
            Self::Jsonl(destination) => {
                let line = Line {
                    index,
                    passage,
                    embedding,
                };
                serde_json::to_writer(&mut *destination, &line)?;
                Ok(destination.write_all(b"\n")?)
            }
        }
    }

    /// `width` is the length of an embedding, for a file without any.
    pub fn finish(self, width: usize) -> anyhow::Result<()> {
        match self {
            Self::Jsonl(destination) => destination.finish(),
            Self::Npy(spool) => spool.finish_npy(width),
            Self::Safetensors(spool) => spool.finish_safetensors(width),
        }
    }
}

/// Rows of f32 kept on disk until their number, which both headers want first, is known.
pub struct Spool {
    destination: Destination,
    /// Little-endian f32. Without a name: nothing is left of it, whatever happens.
    rows: BufWriter<File>,
    count: usize,
}

impl Spool {
    fn create(path: &Path) -> anyhow::Result<Self> {
        Ok(Self {
            destination: Destination::create(path)?,
            rows: BufWriter::new(tempfile::tempfile_in(directory(path))?),
            count: 0,
        })
    }

    fn write(&mut self, row: &[f32]) -> anyhow::Result<()> {
        for value in row {
            self.rows.write_all(&value.to_le_bytes())?;
        }
        self.count += 1;
        Ok(())
    }

    fn into_parts(self) -> anyhow::Result<(Destination, BufReader<File>)> {
        let mut rows = self.rows.into_inner()?;
        rows.rewind()?;
        Ok((self.destination, BufReader::new(rows)))
    }

    fn finish_npy(self, width: usize) -> anyhow::Result<()> {
        let shape = [self.count as u64, width as u64];
        let (mut destination, mut rows) = self.into_parts()?;
        let mut writer = npyz::WriteOptions::new()
            .default_dtype()
            .shape(&shape)
            .writer(&mut destination)
            .begin_nd()?;
        let mut value = [0; 4];
        for _ in 0..shape[0] * shape[1] {
            rows.read_exact(&mut value)?;
            writer.push(&f32::from_le_bytes(value))?;
        }
        writer.finish()?;
        destination.finish()
    }

    fn finish_safetensors(self, width: usize) -> anyhow::Result<()> {
        let info = TensorInfo {
            dtype: Dtype::F32,
            shape: vec![self.count, width],
            data_offsets: (0, self.count * width * size_of::<f32>()),
        };
        let metadata = Metadata::new(None, vec![("embeddings".to_owned(), info)])?;
        let mut header = serde_json::to_vec(&metadata)?;
        // The data start at a multiple of eight bytes.
        header.resize(header.len().next_multiple_of(8), b' ');
        let (mut destination, mut rows) = self.into_parts()?;
        destination.write_all(&(header.len() as u64).to_le_bytes())?;
        destination.write_all(&header)?;
        io::copy(&mut rows, &mut destination)?;
        destination.finish()
    }
}
