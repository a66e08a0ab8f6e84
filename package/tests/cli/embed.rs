use std::io::Write;
use std::process::Stdio;

use npyz::NpyFile;
use radix_mlp::qwen3::Pooling;
use serde_json::{Value, json};

use super::fixtures::{CONTEXT, Fixture, HIDDEN, assert_close, embed_alone, stderr, tokens};

/// Texts of three groups that share prefixes, interleaved, with a repeated one.
fn texts() -> Vec<String> {
    let text = |i: usize| format!("group {} shares this much text, then {}", i % 3, i / 4);
    (0..20).map(text).collect()
}

fn jsonl(texts: &[String]) -> String {
    texts
        .iter()
        .map(|text| json!(text).to_string() + "\n")
        .collect()
}

fn npy(fixture: &Fixture, name: &str) -> Vec<Vec<f32>> {
    let file = NpyFile::new(std::fs::File::open(fixture.path(name)).unwrap()).unwrap();
    let width = file.shape()[1] as usize;
    let values: Vec<f32> = file.into_vec().unwrap();
    values.chunks(width).map(<[f32]>::to_vec).collect()
}

fn vectors(lines: &str) -> Vec<Vec<f32>> {
    let vector = |line: &str| {
        let line: Value = serde_json::from_str(line).unwrap();
        serde_json::from_value(line["embedding"].clone()).unwrap()
    };
    lines.lines().map(vector).collect()
}

#[test]
fn embeddings_are_those_of_each_text_alone_in_the_order_of_the_input() {
    let fixture = Fixture::new();
    let model = fixture.model();
    fixture.write("texts.jsonl", &jsonl(&texts()));
    // A small budget: several batches, each out of order.
    let arguments = [
        "embed",
        "-m",
        "model",
        "-i",
        "texts.jsonl",
        "--batch-tokens",
        "100",
    ];
    for (name, pooling) in [
        ("last-token", Pooling::LastToken),
        ("mean", Pooling::Mean),
        ("cls", Pooling::Cls),
    ] {
        let output = fixture.succeed(&[&arguments[..], &["-o", "-", "--pooling", name]].concat());
        let vectors = vectors(&output);
        assert_eq!(vectors.len(), 20);
        for (text, vector) in texts().iter().zip(&vectors) {
            assert_close(vector, &embed_alone(&model, &tokens(text), pooling));
        }
    }
}

#[test]
fn formats_and_fold_levels_agree() {
    let fixture = Fixture::new();
    fixture.write("texts.txt", &(texts().join("\n\n") + "\n"));
    let embed = |output: &str, fold: &str| {
        fixture.succeed(&[
            "embed",
            "-m",
            "model",
            "-i",
            "texts.txt",
            "-o",
            output,
            "--fold",
            fold,
        ]);
    };
    embed("auto.npy", "auto");
    let auto = npy(&fixture, "auto.npy");
    assert_eq!((auto.len(), auto[0].len()), (20, HIDDEN));
    for fold in ["none", "mlp", "full"] {
        embed("level.npy", fold);
        for (a, b) in auto.iter().zip(npy(&fixture, "level.npy")) {
            assert_close(a, &b);
        }
    }
    embed("auto.jsonl", "auto");
    assert_eq!(vectors(&fixture.read("auto.jsonl")), auto);
    embed("auto.safetensors", "auto");
    let bytes = std::fs::read(fixture.path("auto.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensor = tensors.tensor("embeddings").unwrap();
    assert_eq!(tensor.shape(), [20, HIDDEN]);
    let values = tensor
        .data()
        .chunks(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()));
    assert!(values.eq(auto.concat()));
}

/// The summary's "N tokens, N' computed".
#[test]
fn each_level_computes_what_it_should() {
    let fixture = Fixture::new();
    let computed = |texts: &[String], fold: &str| {
        let arguments = ["embed", "-m", "model", "-i", "-", "-o", "-", "--fold", fold];
        let message = stderr(&fixture.pipe(&arguments, &jsonl(texts)));
        let numbers = message.split_once(": ").unwrap().1.split(", ");
        let number = |part: &str| part.split(' ').next().unwrap().replace(',', "");
        let counts: Vec<usize> = numbers
            .take(2)
            .map(|n| number(n).parse().unwrap())
            .collect();
        (counts[0], counts[1])
    };
    let texts = texts();
    let tokens = texts.iter().map(|text| text.len() + 1).sum();
    assert_eq!(computed(&texts, "none"), (tokens, tokens));
    let (_, unique) = computed(&texts, "full");
    assert!(unique * 3 < tokens, "{unique} of {tokens}");
    for fold in ["mlp", "auto"] {
        assert_eq!(computed(&texts, fold), (tokens, unique));
    }
    let unshared = ["one".to_owned(), "two".to_owned()];
    assert_eq!(computed(&unshared, "auto"), (8, 8));
}

#[test]
fn reduced_precision_stays_near() {
    let fixture = Fixture::new();
    fixture.write("texts.jsonl", &jsonl(&texts()));
    let embed = |dtype: &str| {
        let arguments = [
            "embed",
            "-m",
            "model",
            "-i",
            "texts.jsonl",
            "-o",
            "-",
            "--dtype",
        ];
        vectors(&fixture.succeed(&[&arguments[..], &[dtype]].concat()))
    };
    let reference = embed("f32");
    // Rounding units are 2^-8 and 2^-11; a few of them add up over two layers.
    for (dtype, bound) in [("bf16", 0.05), ("f16", 0.01)] {
        for (a, b) in reference.iter().zip(embed(dtype)) {
            let distance: f32 = a.iter().zip(&b).map(|(a, b)| (a - b).powi(2)).sum();
            assert!(distance.sqrt() < bound, "{dtype}: {}", distance.sqrt());
        }
    }
}

#[test]
fn pairs_name_their_record_and_passage() {
    let fixture = Fixture::new();
    let pairs = json!({"query": "why", "passages": ["because", {"text": "so"}]});
    fixture.write("mixed.jsonl", &format!("{pairs}\n{{\"text\": \"why\"}}\n"));
    let lines = fixture.succeed(&["embed", "-m", "model", "-i", "mixed.jsonl", "-o", "-"]);
    let identity = |line: &str| {
        let line: Value = serde_json::from_str(line).unwrap();
        (line["index"].clone(), line["passage"].clone())
    };
    let identities: Vec<_> = lines.lines().map(identity).collect();
    let expected = [
        (json!(0), json!(0)),
        (json!(0), json!(1)),
        (json!(1), Value::Null),
    ];
    assert_eq!(identities, expected);
}

#[test]
fn templates_and_instructions_shape_the_text() {
    let fixture = Fixture::new();
    let model = fixture.model();
    fixture.write(
        "pairs.jsonl",
        "{\"query\": \"why\", \"passages\": [\"because\"]}\n",
    );
    fixture.write("texts.jsonl", "\"why\"\n");
    for (input, options, text) in [
        (
            "pairs.jsonl",
            &["--template", "{query}: {passage}"][..],
            "why: because",
        ),
        ("texts.jsonl", &["--template", "<{text}>"], "<why>"),
        (
            "texts.jsonl",
            &[
                "--template",
                "{instruction} {text}",
                "--instruction",
                "judge",
            ],
            "judge why",
        ),
        (
            "texts.jsonl",
            &["--instruction", "judge"],
            "Instruct: judge\nQuery:why",
        ),
    ] {
        let arguments = ["embed", "-m", "model", "-i", input, "-o", "-"];
        let output = fixture.succeed(&[&arguments[..], options].concat());
        let alone = embed_alone(&model, &tokens(text), Pooling::LastToken);
        assert_close(&vectors(&output)[0], &alone);
    }
    let arguments = [
        "embed",
        "-m",
        "model",
        "-i",
        "texts.jsonl",
        "-o",
        "-",
        "--template",
    ];
    let message = fixture.fail(&[&arguments[..], &["{query}"]].concat());
    assert!(
        message.contains("line 1") && message.contains("{query}"),
        "{message}"
    );
    let unknown = fixture.run(&[&arguments[..], &["{document}"]].concat());
    assert_eq!(unknown.status.code(), Some(2));
    assert!(stderr(&unknown).contains("{document}"));
}

#[test]
fn dimensions_are_cut_before_normalising() {
    let fixture = Fixture::new();
    fixture.write("texts.jsonl", &jsonl(&texts()));
    let embed = |more: &[&str]| {
        let arguments = ["embed", "-m", "model", "-i", "texts.jsonl", "-o", "-"];
        vectors(&fixture.succeed(&[&arguments[..], more].concat()))
    };
    let norm = |vector: &[f32]| vector.iter().map(|x| x * x).sum::<f32>().sqrt();
    let raw = embed(&["--no-normalize"]);
    let cut = embed(&["--dimensions", "5"]);
    for (raw, cut) in raw.iter().zip(&cut) {
        assert!(
            (norm(raw) - 1.0).abs() > 0.1,
            "random states have no unit length"
        );
        let scaled: Vec<f32> = raw[..5].iter().map(|x| x / norm(&raw[..5])).collect();
        assert_close(&scaled, cut);
    }
    let arguments = ["embed", "-m", "model", "-i", "texts.jsonl", "-o", "x.npy"];
    let message = fixture.fail(&[&arguments[..], &["--dimensions", "33"]].concat());
    assert!(
        message.contains("33") && message.contains("32"),
        "{message}"
    );
}

#[test]
fn standard_input_and_output_work_without_a_terminal() {
    let fixture = Fixture::new();
    let arguments = ["embed", "-m", "model", "-i", "-", "-o", "-"];
    let output = fixture.pipe(&arguments, &jsonl(&texts()));
    assert!(output.status.success());
    assert_eq!(
        vectors(&String::from_utf8(output.stdout.clone()).unwrap()).len(),
        20
    );
    // One line of summary, no bar.
    let message = stderr(&output);
    assert_eq!(message.lines().count(), 1, "{message}");
    assert!(message.starts_with("embedded 20 texts: "), "{message}");

    let text = fixture.pipe(
        &[&arguments[..], &["--format", "text"]].concat(),
        "one\ntwo\n",
    );
    assert_eq!(String::from_utf8(text.stdout).unwrap().lines().count(), 2);
}

#[test]
fn an_empty_input_gives_an_empty_output() {
    let fixture = Fixture::new();
    fixture.write("none.jsonl", "\n\n");
    fixture.succeed(&["embed", "-m", "model", "-i", "none.jsonl", "-o", "none.npy"]);
    let file = std::fs::File::open(fixture.path("none.npy")).unwrap();
    assert_eq!(NpyFile::new(file).unwrap().shape(), [0, HIDDEN as u64]);
}

#[test]
fn a_bad_line_is_named_and_leaves_no_output() {
    let fixture = Fixture::new();
    for (bad, says) in [
        ("{\"text\": ", "EOF"),
        ("[1, 2]", "expected a string"),
        ("{\"query\": \"why\"}", "expected a string"),
        ("{\"text\": 7}", "expected a string"),
        (
            "{\"text\": \"why\", \"query\": \"why\"}",
            "expected a string",
        ),
        ("\u{1F600}\u{FFFF}", "expected value"),
    ] {
        fixture.write("bad.jsonl", &format!("\"good\"\n\n{bad}\n"));
        let message = fixture.fail(&["embed", "-m", "model", "-i", "bad.jsonl", "-o", "out.jsonl"]);
        assert!(
            message.contains("line 3") && message.contains(says),
            "{message}"
        );
        assert_eq!(fixture.files(), ["bad.jsonl"]);
    }
    std::fs::write(fixture.path("bad.jsonl"), b"\"good\"\n\"\xFF\"\n").unwrap();
    let message = fixture.fail(&["embed", "-m", "model", "-i", "bad.jsonl", "-o", "out.npy"]);
    assert!(
        message.contains("line 2") && message.contains("utf-8"),
        "{message}"
    );
}

#[test]
fn a_failed_run_keeps_what_was_there() {
    let fixture = Fixture::new();
    fixture.write("out.npy", "precious");
    fixture.write("bad.jsonl", "\"good\"\n{\n");
    fixture.fail(&["embed", "-m", "model", "-i", "bad.jsonl", "-o", "out.npy"]);
    assert_eq!(fixture.read("out.npy"), "precious");
    assert_eq!(fixture.files(), ["bad.jsonl", "out.npy"]);
}

#[test]
fn what_is_missing_or_unknown_is_named() {
    let fixture = Fixture::new();
    fixture.write("texts.jsonl", "\"text\"\n");
    let fail = |model: &str, input: &str, output: &str| {
        fixture.fail(&["embed", "-m", model, "-i", input, "-o", output])
    };
    assert!(fail("model", "absent.jsonl", "x.npy").contains("absent.jsonl"));
    assert!(fail("model", "texts.jsonl", "absent/x.npy").contains("absent/x.npy"));
    assert!(fail("model", "texts.jsonl", "x.csv").contains(".npy, .jsonl or .safetensors"));
    assert!(fail("nowhere", "texts.jsonl", "x.npy").contains("nowhere/tokenizer.json"));
    fixture.write("texts.data", "text\n");
    assert!(fail("model", "texts.data", "x.npy").contains("--format"));
    std::fs::remove_file(fixture.path("model/model.safetensors")).unwrap();
    assert!(fail("model", "texts.jsonl", "x.npy").contains("model.safetensors"));
    assert_eq!(fixture.files(), ["texts.data", "texts.jsonl"]);
}

#[test]
fn a_text_beyond_the_context_is_refused_or_cut() {
    let fixture = Fixture::new();
    let model = fixture.model();
    let long = "x".repeat(CONTEXT);
    fixture.write("long.txt", &format!("short\n{long}\n"));
    let arguments = ["embed", "-m", "model", "-i", "long.txt", "-o", "-"];
    let message = fixture.fail(&arguments);
    assert!(
        message.contains("line 2") && message.contains("601 tokens"),
        "{message}"
    );
    let cut = vectors(&fixture.succeed(&[&arguments[..], &["--truncate"]].concat()));
    // The end token stays the last.
    let alone = embed_alone(&model, &tokens(&long[1..]), Pooling::LastToken);
    assert_close(&cut[1], &alone);
}

/// Windows of 16 batches: the input is many of them, and the output is as of one.
#[test]
fn long_inputs_stream_through_windows() {
    let fixture = Fixture::new();
    let texts: Vec<String> = (0..300)
        .map(|i| format!("item {} of {}", i, i % 7))
        .collect();
    fixture.write("texts.jsonl", &jsonl(&texts));
    let embed = |budget: &str| {
        let arguments = [
            "embed",
            "-m",
            "model",
            "-i",
            "texts.jsonl",
            "-o",
            "-",
            "--batch-tokens",
        ];
        vectors(&fixture.succeed(&[&arguments[..], &[budget]].concat()))
    };
    for (small, large) in embed("20").iter().zip(embed("100000")) {
        assert_close(small, &large);
    }
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_leaves_nothing() {
    let fixture = Fixture::new();
    for output in ["out.npy", "out.jsonl"] {
        let arguments = [
            "embed",
            "-m",
            "model",
            "-i",
            "-",
            "-o",
            output,
            "--batch-tokens",
            "8",
        ];
        let mut command = fixture.command(&arguments);
        let command = command.stdin(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(jsonl(&texts()).as_bytes()).unwrap();
        // It waits for more input, with a temporary file there.
        while fixture.files().is_empty() {
            assert_eq!(child.try_wait().unwrap(), None, "ended by itself");
            std::thread::yield_now();
        }
        let signal = ["-INT".to_owned(), child.id().to_string()];
        assert!(
            std::process::Command::new("kill")
                .args(signal)
                .status()
                .unwrap()
                .success()
        );
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130));
        assert!(stderr(&output).contains("interrupted"));
        assert_eq!(fixture.files(), [""; 0]);
    }
}
