use crate::Fold;

/// The trie as the picture sees it, by row.
struct Rows {
    /// Rows without a parent: the first tokens of sequences.
    roots: Vec<u32>,
    children: Vec<Vec<u32>>,
    /// How many sequences pass through the row.
    sequences: Vec<usize>,
    /// Which sequences end at the row.
    ends: Vec<Vec<usize>>,
}

impl Rows {
    fn new(fold: &Fold) -> Self {
        let mut rows = Self {
            roots: Vec::new(),
            children: vec![Vec::new(); fold.num_rows()],
            sequences: vec![0; fold.num_rows()],
            ends: vec![Vec::new(); fold.num_rows()],
        };
        for (sequence, ends) in fold.cu_seq_lengths().windows(2).enumerate() {
            let path = &fold.scatter_indices()[ends[0] as usize..ends[1] as usize];
            let mut parent: Option<u32> = None;
            for &row in path {
                if rows.sequences[row as usize] == 0 {
                    match parent {
                        Some(parent) => rows.children[parent as usize].push(row),
                        None => rows.roots.push(row),
                    }
                }
                rows.sequences[row as usize] += 1;
                parent = Some(row);
            }
            if let Some(last) = parent {
                rows.ends[last as usize].push(sequence);
            }
        }
        rows
    }

    /// `row` and the rows below it up to where sequences part or end.
    fn run(&self, row: u32) -> Vec<u32> {
        let mut run = vec![row];
        let mut last = row as usize;
        while let ([child], true) = (&self.children[last][..], self.ends[last].is_empty()) {
            run.push(*child);
            last = *child as usize;
        }
        run
    }
}

pub(crate) fn draw(fold: &Fold, mut label: impl FnMut(&[u32]) -> String) -> String {
    let rows = Rows::new(fold);
    let mut picture = String::new();
    let mut stack: Vec<Branch> = Branch::all(&rows.roots, None);
    while let Some(branch) = stack.pop() {
        let run = rows.run(branch.row);
        let last = run[run.len() - 1] as usize;
        let ids: Vec<u32> = run.iter().map(|&r| fold.input_ids()[r as usize]).collect();
        let sequences = rows.sequences[branch.row as usize];
        picture += &format!(
            "{}{} · {}\n",
            branch.stem,
            label(&ids),
            describe(run.len(), sequences, &rows.ends[last])
        );
        stack.extend(Branch::all(&rows.children[last], Some(&branch)));
    }
    picture
}

/// A run still to draw, and the lines that lead to it.
struct Branch {
    row: u32,
    /// What stands before the run's own line.
    stem: String,
    /// What stands before the lines of its children.
    below: String,
}

impl Branch {
    /// The branches to `rows`, last first: the stack pops them in order.
    fn all(rows: &[u32], parent: Option<&Branch>) -> Vec<Self> {
        let last = rows.len().saturating_sub(1);
        let branch = |(index, &row): (usize, &u32)| match parent {
            None => Self {
                row,
                stem: String::new(),
                below: String::new(),
            },
            Some(parent) if index == last => Self {
                row,
                stem: format!("{}└─ ", parent.below),
                below: format!("{}   ", parent.below),
            },
            Some(parent) => Self {
                row,
                stem: format!("{}├─ ", parent.below),
                below: format!("{}│  ", parent.below),
            },
        };
        rows.iter().enumerate().rev().map(branch).collect()
    }
}

/// What stands behind a run's label.
fn describe(tokens: usize, sequences: usize, ends: &[usize]) -> String {
    let plural = |count: usize| if count == 1 { "" } else { "s" };
    let mut text = format!("{tokens} token{}", plural(tokens));
    if sequences > 1 {
        text += &format!(" × {sequences} sequences");
    }
    if !ends.is_empty() {
        let list: Vec<String> = ends.iter().map(usize::to_string).collect();
        text += &format!(" → sequence{} {}", plural(ends.len()), list.join(", "));
    }
    text
}
