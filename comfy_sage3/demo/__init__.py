"""The bundled model: a tiny Wan 2.1, trained by this project on videos of moving shapes it renders itself."""
