"""What `ris fetch` is made of: files of anybody's servers, on their way to a folder that stages can trust.

catalogue.py   what there is, with size and SHA-256     mirrors.py    where it is had, ours (mirrors.yaml) and the user's
sources.py     http, https, file, s3, from any byte on  download.py   one large file: resumed, checked, put in place
unpack.py      zip archives, within bounds              photos.py     many small files at once, checked as pictures
stock.py       the folder: one copy of all, linked      plan.py       what will be done, and what that costs
recipes.py     what to do next

No module here imports one of `pipelines`: the verb, `pipelines/fetch.py`, gives them their folders.
"""
