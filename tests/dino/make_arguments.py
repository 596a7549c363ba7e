"""Options for tests, complete but for what a test changes."""

from hf_simprune.dino.arguments import DinoArguments


def make_arguments(**values) -> DinoArguments:
    """Default options with `values` in their place."""
    return DinoArguments(**{"output_dir": "out", "dataset_name_or_path": "data", **values})
