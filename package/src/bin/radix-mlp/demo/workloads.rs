//! Sample texts, written for this project.

/// A batch small enough to look at.
pub const SMALL: [&str; 5] = [
    "Does the text answer the question? Question: why is the sky blue? Text: Air scatters blue light most.",
    "Does the text answer the question? Question: why is the sky blue? Text: Air is mostly nitrogen.",
    "Does the text answer the question? Question: why is the sky blue? Text: The sea mirrors the sky.",
    "Does the text answer the question? Question: who painted Guernica? Text: Picasso, in 1937.",
    "Does the text answer the question? Question: who painted Guernica? Text: It hangs in Madrid.",
];

pub struct Workload {
    pub name: &'static str,
    pub texts: Vec<String>,
}

pub fn workloads() -> Vec<Workload> {
    vec![
        Workload {
            name: "reranking",
            texts: reranking(),
        },
        Workload {
            name: "few-shot",
            texts: few_shot(),
        },
        Workload {
            name: "tree",
            texts: tree(),
        },
    ]
}

const SENTENCES: [&str; 12] = [
    "Rivers carry more water in spring, when the snow above the valley melts.",
    "The tram leaves from the square every ten minutes until late in the evening.",
    "A good bread needs flour, water, salt, and a night of patience.",
    "Old maps show a harbour where the market stands today.",
    "The library keeps letters of the families that once owned the mills.",
    "Solar panels on the roofs give a third of what the village uses.",
    "Shepherds still walk their flocks over the pass in October.",
    "The bridge was closed for a year after the flood and rebuilt in stone.",
    "Students pay half, and on Sundays the museum is free.",
    "Two lines of hills keep the wind from the vineyards.",
    "The tower's bell was cast from the cannons of a forgotten war.",
    "In winter the lake freezes, and the children skate to school.",
];

/// `count` sentences from the list, another choice for each `seed`.
fn passage(seed: usize, count: usize) -> String {
    let pick = |i: usize| SENTENCES[(seed * 5 + i * (seed % 7 + 1)) % SENTENCES.len()];
    let sentences: Vec<&str> = (0..count).map(pick).collect();
    format!("[{seed}] {}", sentences.join(" "))
}

/// One query and 20 candidate passages.
fn reranking() -> Vec<String> {
    let question = "You judge search results. Read the question and the passage, and answer with \
        yes if the passage helps to answer the question and with no if it does not. Do not explain \
        your answer, and do not use what you know beyond the passage.\n\
        Question: how do people in the valley travel in winter, and what has changed since the \
        bridge was rebuilt?\nPassage: ";
    (0..20)
        .map(|i| format!("{question}{}\nAnswer:", passage(i, 2)))
        .collect()
}

/// Five worked examples before each of 16 questions.
fn few_shot() -> Vec<String> {
    let examples: String = (0..5)
        .map(|i| {
            let (place, topic) = (i % 3 + 1, i % 4 + 1);
            format!(
                "Text: {}\nHow many sentences are about places, how many about people? \
                 {place} and {topic}.\n\n",
                passage(i + 40, 3)
            )
        })
        .collect();
    (0..16)
        .map(|i| format!("{examples}Text: {}\nHow many", passage(i, 1)))
        .collect()
}

/// An agent that tries three plans, each with two tools, each with four answers.
fn tree() -> Vec<String> {
    let task = format!(
        "Task: plan a weekend in the valley for a family of four.\nNotes: {}\n",
        passage(3, 6)
    );
    let mut texts = Vec::new();
    for plan in 0..3 {
        let planned = format!("{task}Plan {plan}: {}\n", passage(plan + 10, 4));
        for tool in 0..2 {
            let called = format!(
                "{planned}Tool {tool} says: {}\n",
                passage(plan * 2 + tool, 3)
            );
            for answer in 0..4 {
                texts.push(format!(
                    "{called}Answer {answer}: {}",
                    passage(answer + 20, 1)
                ));
            }
        }
    }
    texts
}
