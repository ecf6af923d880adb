"""The texts of the page in the languages of the catalogs."""

from __future__ import annotations

from collections.abc import Sequence

from qwenlocal.i18n import list_languages, mark, translate

_TEXTS = {
    "app_skip": mark("Skip to the question"),
    "chats": mark("Chats"),
    "new_chat": mark("New chat"),
    "search_chats": mark("Search chats"),
    "search_none": mark("No message contains “{words}”."),
    "no_chats": mark("No chats yet."),
    "today": mark("Today"),
    "yesterday": mark("Yesterday"),
    "last_week": mark("Previous 7 days"),
    "older": mark("Older"),
    "open_menu": mark("Show chats"),
    "close_menu": mark("Hide chats"),
    "chat_actions": mark("Actions for “{title}”"),
    "rename": mark("Rename"),
    "rename_prompt": mark("Title of the chat"),
    "delete": mark("Delete"),
    "delete_question": mark("Delete “{title}” permanently?"),
    "export_md": mark("Export as Markdown"),
    "export_json": mark("Export as JSON"),
    "export_html": mark("Export as HTML"),
    "cancel": mark("Cancel"),
    "save": mark("Save"),
    "close": mark("Close"),
    "model": mark("Model"),
    "settings": mark("Settings"),
    "system_prompt": mark("System prompt"),
    "prompt_none": mark("None"),
    "prompt_own": mark("Custom"),
    "sampling": mark("Sampling"),
    "sampling_hint": mark("Empty fields use the values that the model recommends."),
    "temperature": mark("Temperature"),
    "top_p": mark("Top-p"),
    "top_k": mark("Top-k"),
    "min_p": mark("Min-p"),
    "repeat_penalty": mark("Repetition penalty"),
    "max_tokens": mark("Answer limit in tokens"),
    "seed": mark("Seed"),
    "overflow": mark("When the context is full"),
    "overflow_shift": mark("Leave out the oldest turns"),
    "overflow_summarize": mark("Summarize the oldest turns"),
    "overflow_stop": mark("Refuse the question"),
    "reset": mark("Reset"),
    "appearance": mark("Appearance"),
    "theme": mark("Theme"),
    "theme_auto": mark("System"),
    "theme_light": mark("Light"),
    "theme_dark": mark("Dark"),
    "language": mark("Language"),
    "welcome": mark("What would you like to know?"),
    "welcome_hint": mark("Answered by the models on this server. Nothing is sent anywhere else."),
    "to_end": mark("Scroll to the end"),
    "conversation": mark("Conversation"),
    "question": mark("Question"),
    "ask": mark("Ask anything"),
    "send": mark("Send"),
    "stop": mark("Stop"),
    "attach": mark("Attach files"),
    "remove_file": mark("Remove {name}"),
    "reading_file": mark("Reading {name} …"),
    "file_tokens": mark("{count} tokens"),
    "file_share": mark("{count} tokens, {share} of the free context"),
    "file_time": mark(", about {time} to read"),
    "file_huge": mark("more than any context holds"),
    "files_too_long": mark("The files do not fit into the context."),
    "cut_label": mark("Send"),
    "cut_passages": mark("The passages that match the question"),
    "cut_head": mark("The beginning"),
    "cut_none": mark("Everything"),
    "you": mark("You"),
    "assistant": mark("Model"),
    "copy": mark("Copy"),
    "copied": mark("Copied"),
    "copy_code": mark("Copy code"),
    "edit": mark("Edit"),
    "edit_question": mark("Edit the question"),
    "retry": mark("Retry"),
    "versions": mark("Versions"),
    "previous_version": mark("Previous version"),
    "next_version": mark("Next version"),
    "version_of": mark("{index} of {count}"),
    "answering": mark("The model is answering."),
    "loading": mark("Waiting for the model …"),
    "reading_prompt": mark("Reading the prompt: {share}"),
    "answered": mark("The answer is complete."),
    "reason_length": mark("The answer reached its token limit."),
    "reason_context_full": mark("The context is full."),
    "reason_interrupted": mark("Stopped."),
    "reason_stop_string": mark("Ended at a stop string."),
    "no_answer": mark("No answer yet."),
    "evicted_one": mark("To make room, the oldest turn, “{first}”, was removed from the context."),
    "evicted_many": mark(
        "To make room, the oldest {turns} turns, starting with “{first}”, were removed from the context."
    ),
    "no_summary": mark("There was no room for a summary."),
    "summarizing": mark("The context is full. Summarizing the oldest turns: {words} words"),
    "summary": mark("Summary of the turns that were removed from the context"),
    "out_of_context": mark("No longer in the context"),
    "tokens_per_second": mark("{speed} tokens/s"),
    "stats": mark("{tokens} tokens, {speed} tokens/s"),
    "context": mark("Context"),
    "context_used": mark("{used} of {size} tokens"),
    "open_elsewhere": mark(
        "This chat is open in another window. Unless you close that window first, your next message starts a copy."
    ),
    "answering_elsewhere": mark("This chat is being answered in another tab."),
    "reload": mark("Reload"),
    "shortcuts": mark("Keyboard shortcuts"),
    "key_send": mark("Send the question"),
    "key_newline": mark("New line"),
    "key_stop": mark("Stop the answer, or close"),
    "key_search": mark("Search chats"),
    "key_new": mark("New chat"),
    "key_edit": mark("Edit the last question"),
    "key_retry": mark("Retry the last answer"),
    "key_continue": mark("Continue an answer that was cut off"),
    "key_versions": mark("Other versions of the last answer"),
    "key_settings": mark("Settings"),
    "key_help": mark("This list"),
    "key_needed": mark("This page needs a key."),
    "key_hint": mark("It is part of the address that “qwenlocal serve” printed."),
    "continue": mark("Continue"),
    "connection_lost": mark("The server cannot be reached."),
    "nothing_installed": mark("No model is installed. To install one: qwenlocal pull NAME"),
    "image_link": mark("Image: {text}"),
    "table": mark("Table"),
    "code": mark("Code"),
}
_DEFAULT = "en"


def translate_page(requested: str, accepted: str) -> dict[str, object]:
    """
    Return all texts of the page by their keys, in the language `requested`, or else in one that the browser accepts.

    `accepted` is the header Accept-Language: "zh-CN,zh;q=0.9,en;q=0.8".
    """
    languages = [_DEFAULT, *list_languages()]
    language = choose_language([requested, *_parse_accepted(accepted)], languages)
    texts = {key: text if language == _DEFAULT else translate(text, language) for key, text in _TEXTS.items()}
    return {"language": language, "languages": languages, "texts": texts}


def choose_language(wanted: Sequence[str], languages: Sequence[str]) -> str:
    """`choose_language(["de", "zh-CN"], ["en", "zh"])` is "zh"; the first language if none fits."""
    primary = [tag.partition("-")[0].strip().lower() for tag in wanted]
    return next((tag for tag in primary if tag in languages), languages[0])


def _parse_accepted(header: str) -> list[str]:
    """Return the languages of Accept-Language; browsers send them in order of preference."""
    return [part.partition(";")[0] for part in header.split(",")[:20]]
