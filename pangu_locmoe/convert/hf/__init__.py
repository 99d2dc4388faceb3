"""To Hugging Face and back: a folder that Transformers loads with `trust_remote_code=True`.

names.py        which weight is which, there and here
settings.py     config.json: what the PyTorch model has to know of a configuration
exporting.py    a checkpoint -> the folder
importing.py    the folder, as `save_pretrained` writes it too -> a checkpoint
templates/      the PyTorch model and its configuration, copied into every folder
"""
