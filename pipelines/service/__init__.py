"""The HTTP service: models answered over `/v1/segment`, and a page to try them; `ris serve` starts it.

FastAPI on uvicorn. One process with one GPU or CPU is what most downstream teams have: Ray Serve would bring a cluster to
look after, and a dependency as large as the rest together, where `ris[serve]` installs with pip alone. Gradio pins Pillow below
13, and so would downgrade the decoder that reads bytes of anybody; the page is three static files instead.

limits.py      what a request may cost            guard.py    before any handler: token, size of the body, headers, counts
refusal.py     every refusal with its status      reading.py  a request's body, JSON or a form, into what is asked
schema.py      requests and answers as documented engine.py   one model: its waiting requests, its thread, its micro-batches
answers.py     a prediction as JSON               app.py      the routes
metrics.py     what Prometheus reads              page.*      the page
"""
