"""The launcher of vramplan: everything that needs torch (`pip install vramplan[launch]`).

It imports vramplan; vramplan reaches it only inside a command's callback.
"""
