//! The length of source files. A long file is a hint that it has several responsibilities; it is told, not refused.

use std::path::Path;

use anyhow::{Context, Result};

use crate::metadata::Workspace;

/// Past so many lines a file should be split by responsibility.
const LIMIT: usize = 600;

/// Names the files that are longer than that.
pub fn warnings(workspace: &Workspace) -> Result<Vec<String>> {
    let mut warnings = Vec::new();
    for package in workspace.ours() {
        for folder in ["src", "tests", "benches", "examples"] {
            let folder = workspace.root.join(workspace.folder(package)).join(folder);
            if folder.is_dir() {
                visit(&workspace.root, &folder, &mut warnings)?;
            }
        }
    }
    Ok(warnings)
}

fn visit(root: &Path, folder: &Path, warnings: &mut Vec<String>) -> Result<()> {
    for entry in folder
        .read_dir()
        .with_context(|| folder.display().to_string())?
    {
        let path = entry?.path();
        if path.is_dir() {
            visit(root, &path, warnings)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let lines = std::fs::read_to_string(&path)
                .with_context(|| path.display().to_string())?
                .lines()
                .count();
            if lines > LIMIT {
                let path = path.strip_prefix(root).unwrap_or(&path);
                warnings.push(format!(
                    "{} has {lines} lines; split it by responsibility",
                    path.display()
                ));
            }
        }
    }
    Ok(())
}
