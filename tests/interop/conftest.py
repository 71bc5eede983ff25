from support.exported_model import asked, exported, tokenizer_folder, torch  # noqa: F401 (fixtures)
