"""The adapters there are: a line each, with the data set's licence, options and place on the hub.

The names are the sub-commands of ``tools/precompute.py``. Not here: what an adapter is
(`vlm.data.adapters.base`).
"""

from vlm.data.adapters import (
    alt_texts,
    cauldron,
    coco_captions,
    laion,
    llava,
    rlaif_v,
    smoltalk,
    video,
    vqav2,
)
from vlm.data.adapters.base import Adapter

ADAPTERS: dict[str, Adapter] = {
    "video": Adapter(
        annotations=video.annotations,
        options=video.Options,
        licence="",
        help="your own files of videos or images and text (JSON lines, JSON, CSV)",
    ),
    "cauldron": Adapter(
        annotations=cauldron.annotations,
        options=cauldron.Options,
        licence="CC-BY-4.0 (prompts); each subset under its own licence",
        help="50 sets of questions about images, all turns and images",
        hub_id="HuggingFaceM4/the_cauldron",
        hub_files=("*/train-*.parquet",),
    ),
    "smoltalk": Adapter(
        annotations=smoltalk.annotations,
        options=smoltalk.Options,
        licence="Apache-2.0; public subsets under their own licences",
        help="conversations without images, for one of three stages",
        hub_id="HuggingFaceTB/smoltalk",
        hub_files=("data/all/train-*.parquet",),
    ),
    "llava-instruct": Adapter(
        annotations=llava.instruct,
        options=llava.Options,
        licence="CC-BY-4.0 and OpenAI terms of use",
        help="LLaVA-Instruct-150K, or the 665K mixture, with images of COCO and others",
        hub_id="liuhaotian/LLaVA-Instruct-150K",
        hub_files=("llava_instruct_150k.json",),
    ),
    "llava-pretrain": Adapter(
        annotations=llava.pretrain,
        options=llava.Options,
        licence="other: terms of CC3M, LAION, SBU and BLIP",
        help="558K images with short captions as conversations",
        hub_id="liuhaotian/LLaVA-Pretrain",
        hub_files=("blip_laion_cc_sbu_558k.json", "images.zip"),
    ),
    "coco-captions": Adapter(
        annotations=coco_captions.annotations,
        options=coco_captions.Options,
        licence="CC-BY-4.0 (captions); images under Flickr terms",
        help="COCO 2014 or 2017, five captions for each image",
    ),
    "laion": Adapter(
        annotations=laion.annotations,
        options=laion.Options,
        licence="CC-BY-4.0 (metadata); images under their own copyright",
        help="images of the web and their texts: folders, txt, parquet, jsonl or tars",
        hub_id="laion/relaion2B-en-research-safe",
        hub_files=("*.parquet",),
    ),
    "flickr30k": Adapter(
        annotations=alt_texts.flickr30k,
        options=alt_texts.CaptionOptions,
        licence="Apache-2.0 (texts); images: research, Flickr terms",
        help="31K photos, with alt texts or their five captions",
        hub_id="Mozilla/flickr30k-transformed-captions-gpt4o",
        hub_files=("data/*.parquet",),
    ),
    "docornot": Adapter(
        annotations=alt_texts.docornot,
        options=alt_texts.DocOrNotOptions,
        licence="other: terms of RVL-CDIP, Flickr and TextCaps",
        help="scanned documents, with one fixed text",
        hub_id="Mozilla/docornot",
        hub_files=("data/train-*.parquet",),
    ),
    "alt-text-validation": Adapter(
        annotations=alt_texts.alt_text_validation,
        licence="none stated",
        help="photos with alt texts that people corrected; meant to be held out",
        hub_id="Mozilla/alt-text-validation",
        hub_files=("data/train-*.parquet",),
    ),
    "textcaps": Adapter(
        annotations=alt_texts.textcaps,
        options=alt_texts.TextCapsOptions,
        licence="CC-BY-4.0; images CC-BY-2.0",
        help="captions that need the text in the image",
        hub_id="lmms-lab/TextCaps",
        hub_files=("data/train-*.parquet",),
    ),
    "vqav2": Adapter(
        annotations=vqav2.annotations,
        options=vqav2.Options,
        licence="CC-BY-4.0; images under Flickr terms",
        help="questions about COCO images, ten answers each",
    ),
    "rlaif-v": Adapter(
        annotations=rlaif_v.annotations,
        licence="CC-BY-NC-4.0",
        help="pairs of a better and a worse answer about an image, for DPO",
        hub_id="openbmb/RLAIF-V-Dataset",
        hub_files=("RLAIF-V-Dataset_*.parquet",),
    ),
}
