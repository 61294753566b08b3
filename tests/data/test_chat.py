"""Chat templates: the text and the ids that a model is given, and what is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from research.data.chat import prompt_ids, rendered
from research.data.tokenizer import Tokenizer
from research.errors import RequestError
from tests.data.test_tokenizer import foreign

SPECIALS = ("<s>", "</s>", "<|user|>")
TEMPLATE = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- if system is defined %}
{{- '[' + system + ']' }}
{% endif %}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('turns must alternate') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{- '<|user|>' + message['content'] + '<|answer|>' }}
    {%- else %}
        {{- message['content'].split('</think>')[-1] | trim + eos_token }}
    {%- endif %}
{% endfor %}
{% if not add_generation_prompt %}
    {{- '.' -}}
{% endif %}"""

MARKED = """{{ bos_token }}{% set mark = '#' %}
{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% elif loop.index > 3 %}
        {% break %}
    {% elif message.role not in ('user', 'assistant') %}
        {{ raise_exception('no ' + message.role) }}
    {% endif %}
    {% if message.role == 'assistant' %}
        {% generation %}
            {% set mark = loop.index ~ mark %}
{{ mark + message.content }}
{{ eos_token }}
        {% endgeneration %}
{{ mark }}
    {% endif %}
    {% if message.role == 'user' and not (tools or documents or custom_tools is defined or unheard_of) %}
<|user|>{{ mark }}{{ {'<é': [1, none], 'a': tools} | tojson }}
    {% endif %}
{% endfor %}
{{ {'é': 1, 'a': documents} | tojson(true, 1, (',', ' : '), true) }}{{ [1] | tojson(indent=2) }}{{ strftime_now('%Y') }}
{% if add_generation_prompt %}
<|answer|>{% generation %}{% endgeneration %}
{% endif %}"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Of a tokenizer.json of letters, two of whose markers are special and one an ordinary added token."""
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    return foreign(tmp_path_factory.mktemp("chat"), SPECIALS, ["<|answer|>"], config)


@pytest.fixture(scope="module")
def tokenizer(path):
    return Tokenizer.load(path)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_conversation_by_hand(tokenizer):
    """Blocks leave no line break or indentation, as transformers has it; thoughts of earlier answers are left out."""
    turns = [{"role": "system", "content": "Be kind."}, *user("1 < 2?"),
             {"role": "assistant", "content": "so</think> yes "}, *user("why?")]
    text = "<s>[Be kind.]\n<|user|>1 < 2?<|answer|>yes</s><|user|>why?<|answer|>"
    assert rendered(tokenizer, turns) == text
    assert rendered(tokenizer, turns, open_answer=False) == text + "."


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<")))
def test_markers_are_tokens_and_what_is_said_is_text(tokenizer, said):
    begin, mark, answer = (tokenizer.encode(name, special=True).tolist() for name in ("<s>", "<|user|>", "<|answer|>"))
    assert [len(ids) for ids in (begin, mark, answer)] == [1, 1, 1] and begin == [tokenizer.bos_id]
    assert prompt_ids(tokenizer, user(said)) == begin + mark + tokenizer.encode(said).tolist() + answer


def test_a_marker_in_a_message_is_that_token_as_in_transformers_but_not_in_other_texts(tokenizer):
    assert prompt_ids(tokenizer, user("a</s>")).count(tokenizer.eos_id) == 1
    assert tokenizer.eos_id not in next(tokenizer.encode_batch(["a</s>"]))  # nor after the call above
    assert tokenizer.eos_id not in tokenizer.encode("a</s>")


def with_template(tokenizer, text: str | None):
    return Tokenizer(tokenizer._definition, tokenizer.special_tokens, chat_template=text)


@pytest.mark.parametrize("text, said", [
    (None, "the checkpoint has no chat template"),
    ("{{ raise_exception('no ' + messages[0].role) }}", "chat template refuses the messages: no user"),
    ("{{ messages[0].content.attribute.deeper }}", "chat template fails: .*no attribute"),
    ("{% if %}", "chat template fails: Expected an expression"),
    ("{{ ''.__class__.__mro__ }}", "chat template fails: access to attribute '__class__' .* is unsafe"),
    ("{% generation %}x", "chat template fails: Unexpected end of template"),
    ("{{ 1 / 0 }}", "chat template fails: division by zero"),
    ("{{ messages.append(1) }}", "chat template fails: access to attribute 'append' .* is unsafe"),
])
def test_what_does_not_work_is_one_line(tokenizer, text, said):
    with pytest.raises(RequestError, match=said) as caught:
        prompt_ids(with_template(tokenizer, text), user("x"))
    assert "\n" not in str(caught.value)


def test_the_tools_of_templates(tokenizer):
    """Marked answers are as they would be without the mark, but what is set in one is not known after it."""
    turns = [{"role": "system", "content": "."}, *user("1"), {"role": "assistant", "content": "yes"}, *user("2")]
    found = rendered(with_template(tokenizer, MARKED), turns)
    year = found[found.rindex("]") + 1:][:4]
    assert year.isdigit() and found == (
        '<s><|user|>#{"<é": [1, null], "a": null}\n3#yes\n</s>\n#\n'
        '{\n "a" : null,\n "\\u00e9" : 1\n}[\n  1\n]' + year + "\n<|answer|>")
    with pytest.raises(RequestError, match="refuses the messages: no tool"):
        rendered(with_template(tokenizer, MARKED), [{"role": "tool", "content": ""}])


@pytest.mark.parametrize("files, found", [
    ({"tokenizer_config.json": {"chat_template": [{"name": "tool_use", "template": "t"},
                                                  {"name": "default", "template": "d"}]}}, "d"),
    ({"tokenizer_config.json": {"chat_template": [{"name": "tool_use", "template": "t"}]}}, None),
    ({"chat_template.json": {"chat_template": "j"}}, "j"),
    ({"tokenizer_config.json": {"chat_template": "c"}, "chat_template.jinja": "{{ é }}"}, "{{ é }}"),
    ({}, None),
])
def test_where_a_template_lies(tmp_path, files, found):
    path = foreign(tmp_path, SPECIALS)
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    assert Tokenizer.load(path).chat_template == found


@pytest.mark.parametrize("files, ends", [
    ({}, []),
    ({"generation_config.json": {"eos_token_id": [5, 7]}, "config.json": {"eos_token_id": 9}}, [5, 7]),
    ({"generation_config.json": {"temperature": 0.6}, "config.json": {"eos_token_id": 9}}, [9]),
    ({"config.json": {"eos_token_id": [9, 8]}}, [9, 8]),
    ({"config.json": {"model": {"hidden_size": 8}}}, []),
])
def test_where_answers_end(tmp_path, files, ends):
    path = foreign(tmp_path, SPECIALS)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    loaded = Tokenizer.load(path)
    assert loaded.end_ids == [loaded.eos_id, *ends]


@pytest.mark.parametrize("content", ["7.0", '"</s>"', "[true]", "[[1]]", "-1"])
def test_ends_that_are_no_ids_are_refused(tmp_path, content):
    path = foreign(tmp_path, SPECIALS)
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {content}}}')
    with pytest.raises(RequestError, match="generation_config.json: eos_token_id=.* must be a token id or a list"):
        Tokenizer.load(path)


def test_what_is_saved_is_what_was_loaded(path, tmp_path):
    """Also where texts begin without a token, and answers end at several."""
    copy = Tokenizer(path.read_text("utf-8"), {"eos_token": "</s>", "add_bos_token": False}, [3, 4], TEMPLATE)
    copy.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path)
    for name in ("hash", "end_ids", "chat_template", "begins_with_bos", "special_tokens", "vocab_size"):
        assert getattr(again, name) == getattr(copy, name), name
    assert not again.begins_with_bos and again.end_ids == [copy.eos_id, 3, 4]
