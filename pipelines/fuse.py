def settings(corpus, s):
    return {"corpus": corpus, "views": s["views"], "label": s["label"], "splits": s["splits"], "seed": s["seed"]}


build = None
