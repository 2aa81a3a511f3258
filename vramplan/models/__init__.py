"""Models as figures: where a config is found, how it is read, and what it says.

locate.py         id | folder | file | dict -> a plain Hugging Face config
config_files.py   reading a config.json, or saying what was given in its place
hub.py            fetching one from the Hub: the one place with network
catalogue/        configs that come with vramplan, one JSON a checkpoint
hf_config.py      config -> Architecture; the one reader of Hugging Face keys
architecture.py   the figures
tensors.py        every parameter: name, shape, role
blocks/           a family's block as a list of ops
"""
