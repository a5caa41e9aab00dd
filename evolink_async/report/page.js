'use strict';
// Foreign text reaches the page through textContent and properties of elements only, never as markup.
(() => {
  const PAGE = 100;
  const {items, total} = JSON.parse(document.getElementById('data').textContent);
  const find = (id) => document.getElementById(id);
  const [text, status, model, order] = ['text', 'status', 'model', 'order'].map(find);
  const cards = find('cards'), detail = find('detail'), pagers = [...document.querySelectorAll('.pager')];
  let chosen = items, page = 0, opened = 0;

  const make = (name, className, ...inside) => {
    const element = document.createElement(name);
    if (className) element.className = className;
    element.append(...inside.filter((part) => part !== null && part !== undefined && part !== ''));
    return element;
  };
  const words = (state) => state.replace('_', ' ');
  const count = (number) => number.toLocaleString('en');
  const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? '' : 's'}`;
  const span = (seconds) => {
    if (seconds < 0.9995) return `${Math.round(seconds * 1000)} ms`;
    if (seconds < 59.5) return `${seconds.toFixed(seconds < 9.95 ? 1 : 0)} s`;
    const whole = Math.round(seconds), minutes = Math.floor(whole / 60);
    if (minutes < 60) return `${minutes} min ${String(whole % 60).padStart(2, '0')} s`;
    return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, '0')} min`;
  };
  const link = (url, label) => {
    const anchor = make('a', '', label);
    anchor.href = url;
    anchor.target = '_blank';
    anchor.rel = 'noopener noreferrer';
    return anchor;
  };

  // Media: nothing is fetched before it is near the window.

  const near = new IntersectionObserver((entries) => {
    for (const {target, isIntersecting} of entries) {
      if (!isIntersecting) continue;
      near.unobserve(target);
      target.preload = 'metadata';
      target.src = target.dataset.src;
    }
  }, {rootMargin: '200px'});
  const video = (file) => {
    const element = make('video');
    element.preload = 'none';
    element.controls = true;
    element.playsInline = true;
    element.dataset.src = file.url;
    near.observe(element);
    return element;
  };
  const audio = (file) => {
    const element = make('audio');
    element.preload = 'none';
    element.controls = true;
    element.src = file.url;
    return element;
  };
  const image = (source, item, lazy) => {
    const element = make('img');
    element.alt = (item.prompt || item.name).slice(0, 200);
    element.decoding = 'async';
    if (lazy) element.loading = 'lazy';
    element.addEventListener('error', () => element.replaceWith(make('span', 'why', 'the file cannot be shown')), {once: true});
    element.src = source;
    return element;
  };
  const nothing = (item) => {
    if (item.links) return make('span', 'why', link(item.links[0], 'result'), ' (not saved here; dies after 24 h)');
    return make('span', 'why', item.status === 'completed' ? 'no file' : words(item.status));
  };
  const media = (item, place) => {
    const box = make('div', 'media');
    const file = item.files && item.files[0];
    if (!file) box.append(nothing(item));
    else if (file.kind === 'video') box.append(video(file));
    else if (file.kind === 'audio') box.append(audio(file));
    else if (file.preview === null) box.append(make('span', 'why', 'no preview: ', link(file.url, file.name)));
    else {
      const button = make('button', '', image(file.preview || file.url, item, !file.preview));
      button.type = 'button';
      button.setAttribute('aria-label', `Open ${item.name}`);
      button.addEventListener('click', () => open(place));
      box.append(button);
    }
    if (item.files && item.files.length > 1) box.append(make('span', 'more', `${item.files.length} files`));
    return box;
  };

  // The gallery

  const card = (item, place) => {
    const name = make('button', '', make('bdi', '', item.name));
    name.type = 'button';
    name.title = item.name;
    name.addEventListener('click', () => open(place));
    const prompt = item.prompt && make('p', 'prompt', item.prompt);
    if (prompt) prompt.dir = 'auto';
    const facts = [item.credits && `${item.credits} credits`, item.seconds !== undefined && span(item.seconds)];
    const modelName = item.model && make('bdi', '', item.model);
    if (modelName) modelName.title = item.model;
    return make('li', 'card', media(item, place), make('div', 'words',
      make('div', 'top', name, make('span', `state ${item.status}`, words(item.status))),
      prompt,
      item.error && make('p', 'wrong', item.error),
      make('p', 'facts', modelName, facts.filter(Boolean).join(' · '))));
  };
  const pager = () => {
    const last = Math.max(0, Math.ceil(chosen.length / PAGE) - 1);
    return [['← Previous', -1], [null, 0], ['Next →', 1]].map(([label, step]) => {
      if (!label) return make('span', 'dim', `page ${count(page + 1)} of ${count(last + 1)}`);
      const button = make('button', '', label);
      button.type = 'button';
      button.disabled = page + step < 0 || page + step > last;
      button.addEventListener('click', () => { page += step; draw(); find('gallery-title').scrollIntoView(); });
      return button;
    });
  };
  const draw = () => {
    near.disconnect();
    const first = page * PAGE, some = chosen.slice(first, first + PAGE);
    cards.replaceChildren(...some.map((item, number) => card(item, first + number)));
    if (!some.length) cards.append(make('li', 'nothing', items.length ? 'Nothing fits these filters.' : 'No requests.'));
    const shown = chosen.length > PAGE ? `${count(first + 1)}–${count(first + some.length)} of ` : '';
    const of = chosen.length < items.length ? `, of ${count(items.length)}` : '';
    const left = total > items.length ? ` (the first ${count(items.length)} of ${count(total)} in the job)` : '';
    find('count').textContent = shown + plural(chosen.length, 'request') + of + left;
    for (const nav of pagers) {
      nav.hidden = chosen.length <= PAGE;
      nav.replaceChildren(...pager());
    }
  };

  // Filters

  const textOf = (item) => item.all ??= [item.name, item.prompt, item.model, item.error, item.task, item.identity]
    .filter(Boolean).join('\n').toLowerCase();
  const number = (value) => value === undefined ? -1 : Number(value);
  const ORDERS = {
    credits: (a, b) => number(b.credits) - number(a.credits),
    seconds: (a, b) => number(b.seconds) - number(a.seconds),
    quick: (a, b) => a.seconds === undefined ? 1 : b.seconds === undefined ? -1 : a.seconds - b.seconds,
  };
  const choose = () => {
    const wanted = text.value.trim().toLowerCase();
    chosen = items.filter((item) => (!status.value || item.status === status.value)
      && (!model.value || (item.model || '') === model.value) && (!wanted || textOf(item).includes(wanted)));
    if (ORDERS[order.value]) chosen = [...chosen].sort(ORDERS[order.value]);
    page = 0;
    draw();
  };
  const options = (select, field, shown) => {
    const counts = new Map();
    for (const item of items) if (item[field]) counts.set(item[field], (counts.get(item[field]) || 0) + 1);
    const all = make('option', '', `all (${count(items.length)})`);
    all.value = '';
    const others = [...counts].sort((a, b) => b[1] - a[1]).map(([value, times]) => {
      const option = make('option', '', `${shown(value)} (${count(times)})`);
      option.value = value;
      return option;
    });
    select.replaceChildren(all, ...others);
  };

  // One request

  const fact = (name, value) => value === undefined || value === '' ? [] : [make('dt', '', name), make('dd', '', value)];
  const list = (parts) => parts && make('span', '', ...parts.flatMap((part, place) => place ? ['\n', part] : [part]));
  const open = (place) => {
    opened = place;
    const item = chosen[place];
    find('detail-title').replaceChildren(make('bdi', '', item.name));
    const large = (item.files || []).filter((file) => file.kind !== 'image' || file.preview !== null).map((file) =>
      file.kind === 'video' ? video(file) : file.kind === 'audio' ? audio(file) : image(file.url, item, true));
    const credits = item.credits && (item.reserved ? `${item.credits}, of them ${item.reserved} reserved` : item.credits);
    const files = list([...(item.files || []).map((file) => link(file.url, file.name)), ...(item.elsewhere || [])]);
    find('detail-body').replaceChildren(
      ...(large.length ? [make('div', 'large', ...large)] : []),
      make('dl', '',
        ...fact('status', words(item.status)), ...fact('error', item.error), ...fact('prompt', item.prompt),
        ...fact('model', item.model), ...fact('credits', credits),
        ...fact('took', item.seconds === undefined ? undefined : span(item.seconds)),
        ...fact('known late by', item.late === undefined ? undefined : span(Math.max(0, item.late))),
        ...fact('submitted', item.submitted), ...fact('end known', item.finished),
        ...fact('POSTs sent', item.attempts), ...fact('task', item.task),
        ...fact('identity', item.identity), ...(item.files || item.elsewhere ? fact('files', files) : []),
        ...(item.links ? fact('links (24 h)', list(item.links.map((url) => link(url, url)))) : [])));
    find('previous').disabled = place === 0;
    find('next').disabled = place === chosen.length - 1;
    if (!detail.open) detail.showModal();
    detail.scrollTop = 0;
  };
  const turn = (step) => { if (chosen[opened + step]) open(opened + step); };
  find('previous').addEventListener('click', () => turn(-1));
  find('next').addEventListener('click', () => turn(1));
  find('close').addEventListener('click', () => detail.close());
  detail.addEventListener('click', (event) => { if (event.target === detail) detail.close(); });
  detail.addEventListener('close', () => find('detail-body').replaceChildren());
  detail.addEventListener('keydown', (event) => {
    if (event.target.matches('video, audio')) return;
    if (event.key === 'ArrowLeft') turn(-1);
    if (event.key === 'ArrowRight') turn(1);
  });

  options(status, 'status', words);
  options(model, 'model', (value) => value.length > 60 ? value.slice(0, 59) + '…' : value);
  for (const select of [status, model, order]) select.addEventListener('change', choose);
  let pause;
  text.addEventListener('input', () => { clearTimeout(pause); pause = setTimeout(choose, 120); });
  find('filters').addEventListener('submit', (event) => event.preventDefault());
  find('filters').hidden = false;
  document.querySelector('.bar').hidden = false;
  choose();
})();
