"""`ropewalk data ...`: what is done about data besides preparing it."""

import typer

from ropewalk.cli import data_ablate, data_classifier, data_tokenizer

app = typer.Typer(
    help="Learn tokenizers, measure data, and try what cleaning is worth.", no_args_is_help=True
)
app.command("tokenizer")(data_tokenizer.tokenizer)
app.command("fertility")(data_tokenizer.fertility)
app.command("classifier")(data_classifier.classifier)
app.command("ablate")(data_ablate.ablate)
