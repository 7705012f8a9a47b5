"""The Gradio app: page and wiring over ``compare`` and ``study``. Nothing outside this folder imports gradio."""
