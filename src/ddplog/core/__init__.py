"""Pure decisions: records, dedup, watermark, reduce, pipeline. No clock, file, socket, thread or logger."""
