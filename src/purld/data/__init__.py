"""Prompts and images from the files that users bring: JSONL, parquet, saved `datasets` folders, image files.

loaded = load_prompts("prompts.jsonl")                         # purld.data.prompts
train, held_out = split_pool(loaded.prompts, fraction=0.1)
image = read_image("figure.png", Path("images"))               # purld.data.images
mime_type, data = encode_for_sending(image, ImageBounds(side=1536, size=3_500_000))
"""
