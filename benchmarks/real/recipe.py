"""What a recipe for a real model prints, and what the model answers before and after.

    python benchmarks/real/recipe.py [--recipe smollm2] [--runs FOLDER] [--set KEY=VALUE ...]

Writes `results/real_RECIPE.md`: the table of the run, and answers to questions like those it was trained on.
"""

import argparse
import io
import json
from pathlib import Path

from rich.console import Console
from runs import grid

import fedloom
from timing import write_page

QUESTIONS = (
    "Name the one that is a fruit: chair, peach, river. Answer briefly.",
    "Oscar lives in Athens. Anna likes chess. In which city does Oscar live? Answer briefly.",
    "What is the opposite of dark? Answer briefly.",
)


def answers(result: fedloom.Result, question: str) -> tuple[str, str]:
    """Return what the model answers as it was, and as it is delivered."""
    chat = result.chat()
    after = chat.answer(question)
    space = chat.session.space
    space.load(space.start())
    chat.messages = ()
    return chat.answer(question), after


def main() -> None:
    """Run the recipe and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="smollm2")
    parser.add_argument("--runs", type=Path, default=Path("runs/real"))
    parser.add_argument("--set", nargs="*", default=[], help="settings, as behind fedloom run")
    asked = parser.parse_args()
    printed = Console(file=io.StringIO(), width=80)
    folder = asked.runs / asked.recipe
    result = fedloom.run(asked.recipe, folder, overrides=asked.set, console=printed)
    printed.print(result.table())
    cells = [(question, *answers(result, question)) for question in QUESTIONS]
    seconds = result.metrics[-1]["seconds"]
    machine = json.loads((folder / "environment.json").read_text())
    about = f"{seconds:.0f} s in all, training and measuring, on {machine['num_threads']} threads."
    table = grid(("question", "before", "after"), cells).replace("---:", "---")
    text = f"```text\n{printed.file.getvalue().strip()}\n```\n\n{about}\n\n{table}"  # type: ignore[attr-defined]
    print(text)
    write_page(f"real_{asked.recipe}.md", f"The recipe {asked.recipe}, before and after", text)


if __name__ == "__main__":
    main()
