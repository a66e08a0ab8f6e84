use std::path::PathBuf;

use radix_mlp::qwen3::{HiddenStates, Pooling, normalize, truncate_dimensions};
use radix_mlp::text::{Fields, Template};

use super::engine::{Engine, EngineArgs, positive};
use super::input::{Content, InputArgs};
use super::output::Embeddings;
use super::progress::{Progress, Totals};
use super::window::for_each_window;

/// Embed texts: one vector a text, in the order of the input
#[derive(clap::Args)]
#[command(after_help = "\
Input, one record a line:
  \"a text\"                                    a text
  {\"text\": \"a text\"}                          a text
  {\"query\": \"…\", \"passages\": [\"…\", \"…\"]}    a pair of query and passage for each passage
Plain text files hold one text a line.

Output, by extension:
  .npy           float32 [texts, dimensions]
  .safetensors   the same, as tensor \"embeddings\"
  .jsonl or -    {\"index\": record, \"passage\": which, \"embedding\": […]}

Texts that start alike are put into one batch, where what they share is computed once; the output
keeps the order of the input, and appears only when it is complete.

Examples:
  radix-mlp embed -m Qwen3-Embedding-0.6B -i texts.txt -o vectors.npy
  radix-mlp embed -m Qwen3-Embedding-0.6B -i queries.jsonl -o - \\
      --instruction 'Given a web search query, retrieve passages that answer it'
  radix-mlp embed -m DIR -i pairs.jsonl -o pairs.npy --template '{query} [SEP] {passage}'")]
pub struct Args {
    #[command(flatten)]
    engine: EngineArgs,

    #[command(flatten)]
    input: InputArgs,

    /// Where the vectors go: .npy, .jsonl or .safetensors, or - for JSON lines on standard output
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,

    /// How the states of a text's tokens become its vector
    #[arg(long, value_enum, default_value_t = PoolingChoice::LastToken)]
    pooling: PoolingChoice,

    /// Keep the vectors' lengths instead of scaling them to 1
    #[arg(long)]
    no_normalize: bool,

    /// Keep the first N dimensions, of models trained for it (Matryoshka)
    #[arg(long, value_name = "N", value_parser = positive)]
    dimensions: Option<usize>,

    /// What the texts are embedded for; written before each as Qwen3-Embedding wants it
    #[arg(long, value_name = "TEXT")]
    instruction: Option<String>,

    /// How a text is written, with {text}, or {query} and {passage}, and {instruction}
    #[arg(long, value_name = "TEXT")]
    template: Option<Template>,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum PoolingChoice {
    LastToken,
    Mean,
    Cls,
}

impl From<PoolingChoice> for Pooling {
    fn from(choice: PoolingChoice) -> Self {
        match choice {
            PoolingChoice::LastToken => Self::LastToken,
            PoolingChoice::Mean => Self::Mean,
            PoolingChoice::Cls => Self::Cls,
        }
    }
}

/// Turns records into texts.
struct Templates {
    text: Template,
    pair: Template,
    instruction: Option<String>,
}

impl Templates {
    fn new(args: &Args) -> anyhow::Result<Self> {
        let template = |default: &str| match &args.template {
            Some(template) => Ok(template.clone()),
            None => default.parse(),
        };
        // Qwen3-Embedding's form of a query; source: the model card of Qwen/Qwen3-Embedding-0.6B.
        let (text, pair) = match args.instruction {
            Some(_) => (
                "Instruct: {instruction}\nQuery:{text}",
                "Instruct: {instruction}\nQuery:{query}\n{passage}",
            ),
            None => ("{text}", "{query}\n{passage}"),
        };
        Ok(Self {
            text: template(text)?,
            pair: template(pair)?,
            instruction: args.instruction.clone(),
        })
    }

    fn fill(&self, content: Content) -> anyhow::Result<Vec<String>> {
        let instruction = self.instruction.as_deref();
        let texts = match content {
            Content::Text(text) => {
                let fields = Fields {
                    text: Some(&text),
                    instruction,
                    ..Fields::default()
                };
                vec![self.text.render(fields)?]
            }
            Content::Pairs { query, passages } => {
                let pair = |passage: &String| {
                    self.pair.render(Fields {
                        query: Some(&query),
                        passage: Some(passage),
                        instruction,
                        text: None,
                    })
                };
                passages.iter().map(pair).collect::<Result<_, _>>()?
            }
        };
        Ok(texts)
    }
}

impl Args {
    /// The vectors of a batch, one a sequence.
    fn vectors(&self, states: &HiddenStates<'_>) -> anyhow::Result<Vec<Vec<f32>>> {
        let mut pooled = states.pool(self.pooling.into())?;
        if let Some(dimensions) = self.dimensions {
            pooled = truncate_dimensions(&pooled, dimensions)?;
        }
        if !self.no_normalize {
            pooled = normalize(&pooled)?;
        }
        Ok(pooled.to_vec2()?)
    }
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let mut records = args.input.open()?;
    let mut output = Embeddings::create(&args.output)?;
    let templates = Templates::new(args)?;
    let engine = Engine::load(&args.engine)?;
    let width = args.dimensions.unwrap_or(engine.model.config().hidden_size);

    let progress = Progress::new(&records)?;
    let mut totals = Totals::default();
    let mut index = 0;
    let fill = |content| templates.fill(content);
    for_each_window(
        &mut records,
        args.engine.batch_tokens,
        fill,
        |records, window| {
            let encoded = engine.encoder.encode(&window.texts, engine.max_length);
            let sequences = window.sequences(encoded)?;
            let mut embeddings = vec![Vec::new(); sequences.len()];
            engine.run(&sequences, &mut totals, |members, states, totals| {
                for (&member, embedding) in members.iter().zip(args.vectors(states)?) {
                    embeddings[member] = embedding;
                }
                progress.update(records, totals);
                Ok(())
            })?;
            let mut embeddings = embeddings.iter();
            for entry in &window.entries {
                for (text, embedding) in embeddings.by_ref().take(entry.texts).enumerate() {
                    output.write(index, entry.pairs.then_some(text), embedding)?;
                }
                index += 1;
            }
            Ok(())
        },
    )?;
    output.finish(width)?;
    progress.finish("embedded", totals);
    Ok(())
}
