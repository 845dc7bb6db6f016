"""A data spec -> sampled rows -> batches of model inputs. Everything is read through `datasets`."""
