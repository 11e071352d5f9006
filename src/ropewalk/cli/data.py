"""`ropewalk data ...`: what is done about data besides preparing it."""

import typer

from ropewalk.cli import data_tokenizer

app = typer.Typer(help="Tokenizers and measures of data.", no_args_is_help=True)
app.command("tokenizer")(data_tokenizer.tokenizer)
app.command("fertility")(data_tokenizer.fertility)
