use super::fixtures::Fixture;

#[test]
fn stats_counts_what_is_shared() {
    let fixture = Fixture::new();
    // With the end token: "abcde." twice the same, "abcxy." parts after three.
    fixture.write("texts.txt", "abcde\nabcxy\nabcde\n");
    let tokenizer = "model/tokenizer.json";
    let report = fixture.succeed(&["stats", "-t", tokenizer, "-i", "texts.txt"]);
    let value = |name: &str| {
        let line = report.lines().find(|line| line.starts_with(name));
        line.unwrap_or_else(|| panic!("{name} in {report}"))[name.len()..]
            .trim()
            .to_owned()
    };
    assert_eq!(value("texts "), "3");
    assert_eq!(value("tokens "), "18");
    assert_eq!(value("unique tokens "), "9");
    assert_eq!(value("compression "), "2.00×");
    assert!(value("batches ").starts_with("1, "));
    let report = fixture.succeed(&[
        "stats",
        "-t",
        tokenizer,
        "-i",
        "texts.txt",
        "--batch-tokens",
        "6",
    ]);
    assert!(report.contains("batches         2, "), "{report}");
}

#[test]
fn stats_names_a_bad_line() {
    let fixture = Fixture::new();
    fixture.write("bad.jsonl", "\"good\"\n7\n");
    let message = fixture.fail(&["stats", "-t", "model/tokenizer.json", "-i", "bad.jsonl"]);
    assert!(message.contains("line 2"), "{message}");
}

#[test]
fn the_demo_needs_nothing_and_folds() {
    let fixture = Fixture::new();
    let report = fixture.succeed(&["demo", "--runs", "1"]);
    assert!(!report.contains('\x1b'), "no colours in a pipe");
    assert!(report.contains("× 5 sequences"), "the picture of the trie");
    for workload in ["reranking", "few-shot", "tree"] {
        assert!(report.contains(workload), "{report}");
    }
    let differences = report.lines().filter_map(|line| {
        let (_, after) = line.split_once(" full ")?;
        after.split_whitespace().last()?.parse::<f64>().ok()
    });
    let differences: Vec<f64> = differences.collect();
    assert_eq!(differences.len(), 3, "{report}");
    // f32 sums in another order, over four layers.
    assert!(differences.iter().all(|&d| d < 1e-5), "{report}");
}

#[test]
fn help_teaches() {
    let fixture = Fixture::new();
    for (command, teaches) in [("embed", "\"passages\""), ("rerank", "best passage first")] {
        assert!(fixture.succeed(&[command, "--help"]).contains(teaches));
    }
    assert!(fixture.succeed(&["--version"]).starts_with("radix-mlp "));
    assert_eq!(
        fixture.run(&["embed", "--fold", "half"]).status.code(),
        Some(2)
    );
}
