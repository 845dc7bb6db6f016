"""Reports: what a ranking, masks, models and a sweep hold, as one page, as pictures and as a table. Without torch."""
