"""Scenes: drawn pictures of coloured solids with exact depth, segmentation, captions, questions and answers."""

from lit_vlm.worlds.scenes.language import caption as caption
from lit_vlm.worlds.scenes.language import describe_for as describe_for
from lit_vlm.worlds.scenes.questions import QUESTION_KINDS as QUESTION_KINDS
from lit_vlm.worlds.scenes.questions import Question as Question
from lit_vlm.worlds.scenes.questions import QuestionKind as QuestionKind
from lit_vlm.worlds.scenes.questions import ask as ask
from lit_vlm.worlds.scenes.questions import ask_about as ask_about
from lit_vlm.worlds.scenes.render import Rendering as Rendering
from lit_vlm.worlds.scenes.render import render as render
from lit_vlm.worlds.scenes.sampling import sample_looks as sample_looks
from lit_vlm.worlds.scenes.sampling import sample_scene as sample_scene
from lit_vlm.worlds.scenes.source import Scenes as Scenes
from lit_vlm.worlds.scenes.world import Camera as Camera
from lit_vlm.worlds.scenes.world import Look as Look
from lit_vlm.worlds.scenes.world import Scene as Scene
from lit_vlm.worlds.scenes.world import Thing as Thing
